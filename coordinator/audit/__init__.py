"""Check what a coordinator did from its transcripts alone, without torch or Flower."""
