def draw_figures(document, folder, formats):
    return []
