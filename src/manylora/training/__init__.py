"""What a training run is made of; `manylora.train` puts it together."""
