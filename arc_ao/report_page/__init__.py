"""`arc-ao report --html`: what is measured (data.py), and the page that shows it (page.py)."""
