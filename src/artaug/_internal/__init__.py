"""What several rooms share and no user needs: files, digests, images, texts, checked values."""
