//! BERT and DistilBERT with a classification head, as `transformers` computes them.
//!
//! Devlin and others, *BERT* (2018); Sanh and others, *DistilBERT* (2019). One file serves both: they differ in names,
//! in the kind of a token (BERT alone), and in the head. candle-transformers has the encoders, but no heads, and computes
//! DistilBERT's GELU by an approximation that moves logits in the third digit.

use candle_core::{D, DType, Result, Tensor};
use candle_nn::{Embedding, LayerNorm, Linear, Module as _, VarBuilder, embedding, layer_norm, linear};
use serde::Deserialize;

/// What a `config.json` says, in the words of either family.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct EncoderConfig {
    pub model_type: Family,
    pub vocab_size: usize,
    #[serde(alias = "dim")]
    pub hidden_size: usize,
    #[serde(alias = "n_layers")]
    pub num_hidden_layers: usize,
    #[serde(alias = "n_heads")]
    pub num_attention_heads: usize,
    #[serde(alias = "hidden_dim")]
    pub intermediate_size: usize,
    #[serde(alias = "activation")]
    pub hidden_act: Activation,
    pub max_position_embeddings: usize,
    #[serde(default = "two")]
    pub type_vocab_size: usize,
    #[serde(default = "layer_norm_eps")]
    pub layer_norm_eps: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Family {
    Bert,
    DistilBert,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Activation {
    Gelu,
    GeluNew,
    Relu,
}

/// The whole network.
pub(super) struct Encoder {
    words: Embedding,
    positions: Embedding,
    /// BERT's kinds of tokens: prompt, response.
    kinds: Option<Embedding>,
    norm: LayerNorm,
    layers: Vec<Layer>,
    head: Head,
}

struct Layer {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    attention_norm: LayerNorm,
    widen: Linear,
    narrow: Linear,
    norm: LayerNorm,
    heads: usize,
    activation: Activation,
}

/// What becomes of the first token.
struct Head {
    pooler: Linear,
    family: Family,
    classifier: Linear,
}

/// Names of the weights of a layer, below it.
struct Names {
    query: &'static str,
    key: &'static str,
    value: &'static str,
    output: &'static str,
    attention_norm: &'static str,
    widen: &'static str,
    narrow: &'static str,
    norm: &'static str,
}

const BERT: Names = Names {
    query: "attention.self.query",
    key: "attention.self.key",
    value: "attention.self.value",
    output: "attention.output.dense",
    attention_norm: "attention.output.LayerNorm",
    widen: "intermediate.dense",
    narrow: "output.dense",
    norm: "output.LayerNorm",
};

const DISTILBERT: Names = Names {
    query: "attention.q_lin",
    key: "attention.k_lin",
    value: "attention.v_lin",
    output: "attention.out_lin",
    attention_norm: "sa_layer_norm",
    widen: "ffn.lin1",
    narrow: "ffn.lin2",
    norm: "output_layer_norm",
};

fn two() -> usize {
    2
}

/// DistilBERT's, which no file states, and BERT's usual one.
fn layer_norm_eps() -> f64 {
    1e-12
}

// === impl Encoder ===

impl Encoder {
    /// `labels` is the number of logits.
    pub fn load(config: &EncoderConfig, labels: usize, weights: &VarBuilder<'_>) -> Result<Self> {
        let EncoderConfig { hidden_size, layer_norm_eps, .. } = *config;
        let (names, layers, root, pooler) = match config.model_type {
            Family::Bert => (BERT, "encoder.layer", "bert", "bert.pooler.dense"),
            Family::DistilBert => (DISTILBERT, "transformer.layer", "distilbert", "pre_classifier"),
        };
        let root = weights.pp(root);
        let below = root.pp("embeddings");
        let kinds = |size| embedding(size, hidden_size, below.pp("token_type_embeddings"));
        let layer = |index| Layer::load(config, &names, &root.pp(format!("{layers}.{index}")));
        Ok(Self {
            words: embedding(config.vocab_size, hidden_size, below.pp("word_embeddings"))?,
            positions: embedding(
                config.max_position_embeddings,
                hidden_size,
                below.pp("position_embeddings"),
            )?,
            kinds: (config.model_type == Family::Bert).then(|| kinds(config.type_vocab_size)).transpose()?,
            norm: layer_norm(hidden_size, layer_norm_eps, below.pp("LayerNorm"))?,
            layers: (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?,
            head: Head {
                pooler: linear(hidden_size, hidden_size, weights.pp(pooler))?,
                family: config.model_type,
                classifier: linear(hidden_size, labels, weights.pp("classifier"))?,
            },
        })
    }

    /// Logits of one text. One at a time, for then no padding can matter and a score never depends on its neighbours.
    pub fn forward(&self, tokens: &[u32], kinds: &[u32]) -> Result<Vec<f32>> {
        let device = self.words.embeddings().device();
        let tokens = Tensor::new(tokens, device)?; // (seq)
        let positions = Tensor::arange(0, tokens.elem_count() as u32, device)?; // (seq)
        let mut x = (self.words.forward(&tokens)? + self.positions.forward(&positions)?)?; // (seq, hidden)
        if let Some(embedding) = &self.kinds {
            x = (x + embedding.forward(&Tensor::new(kinds, device)?)?)?;
        }
        x = self.norm.forward(&x)?;
        for layer in &self.layers {
            x = layer.forward(&x)?;
        }
        self.head.forward(&x.narrow(0, 0, 1)?)
    }
}

// === impl Layer ===

impl Layer {
    fn load(config: &EncoderConfig, names: &Names, weights: &VarBuilder<'_>) -> Result<Self> {
        let EncoderConfig { hidden_size, intermediate_size, layer_norm_eps, .. } = *config;
        let square = |name| linear(hidden_size, hidden_size, weights.pp(name));
        Ok(Self {
            query: square(names.query)?,
            key: square(names.key)?,
            value: square(names.value)?,
            output: square(names.output)?,
            attention_norm: layer_norm(hidden_size, layer_norm_eps, weights.pp(names.attention_norm))?,
            widen: linear(hidden_size, intermediate_size, weights.pp(names.widen))?,
            narrow: linear(intermediate_size, hidden_size, weights.pp(names.narrow))?,
            norm: layer_norm(hidden_size, layer_norm_eps, weights.pp(names.norm))?,
            heads: config.num_attention_heads,
            activation: config.hidden_act,
        })
    }

    /// Normalised after each addition, as in the first transformers.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = self.attention_norm.forward(&(x + self.attention(x)?)?)?; // (seq, hidden)
        let wide = self.widen.forward(&x)?; // (seq, intermediate)
        let wide = match self.activation {
            Activation::Gelu => wide.gelu_erf()?,
            Activation::GeluNew => wide.gelu()?,
            Activation::Relu => wide.relu()?,
        };
        self.norm.forward(&(self.narrow.forward(&wide)? + x)?)
    }

    fn attention(&self, x: &Tensor) -> Result<Tensor> {
        let (seq, hidden) = x.dims2()?;
        let head_dim = hidden / self.heads;
        let split = |linear: &Linear| -> Result<Tensor> {
            linear.forward(x)?.reshape((seq, self.heads, head_dim))?.transpose(0, 1)?.contiguous() // (heads, seq, head_dim)
        };
        let query = (split(&self.query)? / (head_dim as f64).sqrt())?;
        let scores = query.matmul(&split(&self.key)?.t()?)?; // (heads, seq, seq)
        let weights = candle_nn::ops::softmax(&scores, D::Minus1)?;
        let mixed = weights.matmul(&split(&self.value)?)?; // (heads, seq, head_dim)
        self.output.forward(&mixed.transpose(0, 1)?.reshape((seq, hidden))?)
    }
}

// === impl Head ===

impl Head {
    /// `first` is (1, hidden).
    fn forward(&self, first: &Tensor) -> Result<Vec<f32>> {
        let pooled = self.pooler.forward(first)?;
        let pooled = match self.family {
            Family::Bert => pooled.tanh()?,
            Family::DistilBert => pooled.relu()?,
        };
        self.classifier.forward(&pooled)?.squeeze(0)?.to_dtype(DType::F32)?.to_vec1()
    }
}
