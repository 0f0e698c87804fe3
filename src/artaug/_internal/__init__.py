"""What several rooms share and no user needs: atomic files, checked values, truncation warnings."""
