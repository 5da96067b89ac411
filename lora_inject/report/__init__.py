"""What an adapter does to its base, to look at: spectra and norms, as one HTML page or one PNG."""
