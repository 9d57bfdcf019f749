"Sphinx's settings for the web site; `python .ci/site` builds it."
project = "ddpo_scratch"
html_title = "ddpo_scratch"
master_doc = "index"
extensions = ["myst_nb"]
nb_execution_mode = "off"  # the outputs that are committed are shown
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
html_theme = "sphinx_book_theme"
html_theme_options = {"show_navbar_depth": 1, "home_page_in_toc": True,
                      "use_download_button": False, "show_toc_level": 2,
                      "footer_content_items": []}
html_static_path = ["_static"]
html_show_sourcelink = False
html_copy_source = False
mathjax_path = "mathjax/tex-chtml-full.js"  # shipped with the site
html_css_files = ["book.css"]
html_context = {"default_mode": "auto"}
