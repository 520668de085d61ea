"""Small steps of the trunk and the heads in one compiled call over all layers."""
