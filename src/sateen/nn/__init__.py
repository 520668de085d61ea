"""Layers of hybrid-attention decoders; see `sateen.nn.spec` for what may differ between them."""
