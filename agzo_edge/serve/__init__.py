"""Using the result: generating and exporting; and looking at the machine."""
