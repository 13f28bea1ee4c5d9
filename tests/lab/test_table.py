from nanoinfra.lab.display_table import DisplayTable


def test_a_grid_shows_itself_in_both_worlds():
    grid = DisplayTable("t", ("what", "verdict"), [("a < b", "pass"), ("pass", "wrong")])
    assert "a < b" in repr(grid) and "\x1b" not in repr(grid)
    html = grid._repr_html_()
    assert "a &lt; b" in html and html.count("font-weight:bold") == 2
