"""A model's name -> a folder -> weights: the Hub, the embedded model, files, loading."""
