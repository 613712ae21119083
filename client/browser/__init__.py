"""The page that runs a bundle in a browser, and the server that hands it out."""
