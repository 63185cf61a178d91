//! What a model asks of a machine, from the sizes in its configuration.

/// The sizes of a Llama-like decoder.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Architecture {
    pub name: &'static str,
    pub layers: usize,
    pub hidden: usize,
    pub intermediate: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocabulary: usize,
}

/// Bytes of a weight and of a number in the cache: 16 bits on every accelerator that has a name.
const NUMBER_BYTES: f64 = 2.0;

const fn llama(
    name: &'static str,
    [layers, hidden, intermediate]: [usize; 3],
    [heads, kv_heads, head_dim]: [usize; 3],
    vocabulary: usize,
) -> Architecture {
    Architecture { name, layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary }
}

/// Every model that has a name; the numbers stand in the `config.json` of each.
pub const ARCHITECTURES: [Architecture; 7] = [
    llama("smollm2-135m", [30, 576, 1536], [9, 3, 64], 49_152),
    llama("qwen2.5-0.5b", [24, 896, 4864], [14, 2, 64], 151_936),
    llama("qwen2.5-1.5b", [28, 1536, 8960], [12, 2, 128], 151_936),
    llama("llama-3.2-1b", [16, 2048, 8192], [32, 8, 64], 128_256),
    llama("llama-3.2-3b", [28, 3072, 8192], [24, 8, 128], 128_256),
    llama("llama-3.1-8b", [32, 4096, 14_336], [32, 8, 128], 128_256),
    llama("llama-3.1-70b", [80, 8192, 28_672], [64, 8, 128], 128_256),
];

/// The model of this name.
pub fn architecture(name: &str) -> Option<Architecture> {
    ARCHITECTURES.into_iter().find(|architecture| architecture.name == name)
}

// === impl Architecture ===

impl Architecture {
    /// Weights of the layers' matrices: every token passes all of them.
    pub fn layer_parameters(&self) -> f64 {
        let attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads);
        let mlp = 3 * self.hidden * self.intermediate;
        (self.layers * (attention + mlp)) as f64
    }

    /// Weights of the output projection: only tokens whose logits are wanted pass it.
    pub fn head_parameters(&self) -> f64 {
        (self.hidden * self.vocabulary) as f64
    }

    /// Bytes in memory; an embedding of its own is left out, because a step reads a row of it for each token.
    pub fn weight_bytes(&self) -> f64 {
        (self.layer_parameters() + self.head_parameters()) * NUMBER_BYTES
    }

    /// Bytes that a token leaves in the cache.
    pub fn cache_bytes(&self) -> f64 {
        (2 * self.layers * self.kv_heads * self.head_dim) as f64 * NUMBER_BYTES
    }

    /// Operations by which one token attends to one position: two products over all heads.
    pub fn attention_operations(&self) -> f64 {
        (4 * self.layers * self.heads * self.head_dim) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_models_have_the_sizes_in_their_names() {
        for (name, parameters) in
            [("smollm2-135m", 0.135e9), ("llama-3.2-1b", 1.24e9), ("llama-3.1-70b", 70e9)]
        {
            let model = architecture(name).unwrap();
            let own = model.layer_parameters() + model.head_parameters();
            assert!((own / parameters - 1.0).abs() < 0.03, "{name}: {own}");
        }
    }
}
