"""What two machines must compute identically: codec, ring, masks, shares, messages, states."""
