"""`verify`, and the page for a sign-off."""
