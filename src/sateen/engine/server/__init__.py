"""OpenAI's HTTP interface over one engine: `sateen serve`."""
