"""What the scripts share: options and the terminal."""
