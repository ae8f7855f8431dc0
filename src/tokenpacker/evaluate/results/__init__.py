"""What a folder of results says: intervals, the page, the elastic curve, and two folders compared."""
