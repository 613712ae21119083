"""From adapter to device: base graph, quantization, adapter files, parity gate."""
