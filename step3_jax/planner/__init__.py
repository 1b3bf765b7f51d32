"""What a deployment of a large model needs: pure arithmetic, without a device."""
