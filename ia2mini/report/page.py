def write_page(document, folder, command):
    return ""
