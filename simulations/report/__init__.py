"""What a run says about itself: terminal table, HTML page, figures, runs side by side."""
