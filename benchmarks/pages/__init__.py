"""What the pages share: tables, numbers in words, colours and figures.

The quality bench, the lab and the overhead bench write pages of the site from committed results;
this room knows how those pages look, and nothing of what was measured.

===========  ==================================
`tables`     Markdown tables, and numbers as text
`figures`    colours, the style, files of figures
`example`    the run of the worked example
===========  ==================================
"""
