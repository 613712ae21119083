"""What an adapter is: method, layout, file, manifest; and the frozen base it belongs to."""
