"""What is shown of results: tables, figures, pages. It reads results and decides nothing."""
