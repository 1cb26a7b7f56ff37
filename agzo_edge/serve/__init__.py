"""Using the result: generating, exporting, reporting."""
