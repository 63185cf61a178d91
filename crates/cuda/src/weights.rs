//! Weights on the device, as rows of outputs; projections that share an input are one matrix.

use cudarc::driver::{DeviceRepr, ValidAsZeroBits};
use half::bf16;
use uniarm_model::{Config, Linear, ModelError, ModelFiles, Weights};

use crate::device::Device;
use crate::memory::Memory;

/// Numbers that are decoded and copied at a time: a matrix at once would take gigabytes of the host.
const PIECE_NUMBERS: usize = 1 << 24;

/// How the device holds weights. Norms, biases, adapters, activations and sums are f32 in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightFormat {
    /// As exact as the file, for files of at most 32 bits.
    F32,
    /// Half the bytes, and so nearly half the time of a step over few rows. Exact for files of bf16.
    Bf16,
}

/// A matrix, (outputs, inputs).
pub(crate) struct Matrix {
    numbers: Numbers,
    pub outputs: usize,
    pub inputs: usize,
}

enum Numbers {
    F32(Memory<f32>),
    Bf16(Memory<bf16>),
}

pub(crate) struct LlamaWeights {
    /// (vocabulary, hidden); none where the output projection is tied to it.
    embedding: Option<Matrix>,
    pub layers: Vec<Layer>,
    pub norm: Memory<f32>,
    /// (vocabulary, hidden)
    pub head: Matrix,
}

pub(crate) struct Layer {
    pub attention_norm: Memory<f32>,
    /// (queries + 2 × keys, hidden)
    pub qkv: Matrix,
    pub qkv_bias: Option<Memory<f32>>,
    /// (hidden, queries)
    pub output: Matrix,
    pub mlp_norm: Memory<f32>,
    /// Gate, then up: (2 × intermediate, hidden)
    pub gate_up: Matrix,
    /// (hidden, intermediate)
    pub down: Matrix,
}

/// Where weights come from, and where they go.
struct Loader<'a> {
    device: &'a Device,
    weights: &'a Weights,
    config: &'a Config,
    format: WeightFormat,
}

impl LlamaWeights {
    pub fn load(device: &Device, files: &ModelFiles, format: WeightFormat) -> Result<Self, ModelError> {
        let ModelFiles { config, weights, .. } = files;
        let loader = Loader { device, weights, config, format };
        let Config { vocabulary, hidden, .. } = *config;
        let embedding = loader.matrix(&[("model.embed_tokens.weight".to_owned(), vocabulary)], hidden)?;
        let (embedding, head) = match config.tied_embeddings {
            true => (None, embedding),
            false => (Some(embedding), loader.matrix(&[("lm_head.weight".to_owned(), vocabulary)], hidden)?),
        };
        let layers: Result<Vec<Layer>, ModelError> =
            (0..config.layers).map(|layer| loader.layer(layer)).collect();
        let norm = loader.vector(&[("model.norm.weight".to_owned(), hidden)])?;
        Ok(Self { embedding, layers: layers?, norm, head })
    }

    pub fn embedding(&self) -> &Matrix {
        self.embedding.as_ref().unwrap_or(&self.head)
    }

    /// Bytes that a step over few rows reads: all matrices once.
    pub fn bytes(&self) -> usize {
        let layers = self.layers.iter();
        let matrices = layers.flat_map(|layer| [&layer.qkv, &layer.output, &layer.gate_up, &layer.down]);
        matrices.chain([&self.head]).map(Matrix::bytes).sum()
    }
}

impl Matrix {
    pub fn address(&self) -> u64 {
        match &self.numbers {
            Numbers::F32(memory) => memory.at(0),
            Numbers::Bf16(memory) => memory.at(0),
        }
    }

    /// How its numbers are held: which kernels take it.
    pub fn format(&self) -> WeightFormat {
        match &self.numbers {
            Numbers::F32(_) => WeightFormat::F32,
            Numbers::Bf16(_) => WeightFormat::Bf16,
        }
    }

    fn bytes(&self) -> usize {
        match &self.numbers {
            Numbers::F32(memory) => memory.bytes(),
            Numbers::Bf16(memory) => memory.bytes(),
        }
    }
}

impl Loader<'_> {
    fn layer(&self, layer: usize) -> Result<Layer, ModelError> {
        let Config { hidden, intermediate, heads, head_dim, qkv_bias, .. } = *self.config;
        let name = |suffix: &str| format!("model.layers.{layer}.{suffix}");
        let parts = |linear: &[Linear], kind: &str| -> Vec<(String, usize)> {
            let part =
                |linear: &Linear| (name(&format!("{}.{kind}", linear.name())), linear.outputs(self.config));
            linear.iter().map(part).collect()
        };
        let norm = |suffix: &str| self.vector(&[(name(suffix), hidden)]);
        let qkv = [Linear::Query, Linear::Key, Linear::Value];
        let qkv_bias = match qkv_bias {
            true => Some(self.vector(&parts(&qkv, "bias"))?),
            false => None,
        };
        Ok(Layer {
            attention_norm: norm("input_layernorm.weight")?,
            qkv: self.matrix(&parts(&qkv, "weight"), hidden)?,
            qkv_bias,
            output: self.matrix(&parts(&[Linear::Output], "weight"), heads * head_dim)?,
            mlp_norm: norm("post_attention_layernorm.weight")?,
            gate_up: self.matrix(&parts(&[Linear::Gate, Linear::Up], "weight"), hidden)?,
            down: self.matrix(&parts(&[Linear::Down], "weight"), intermediate)?,
        })
    }

    /// Vectors by name and length, one after the other.
    fn vector(&self, parts: &[(String, usize)]) -> Result<Memory<f32>, ModelError> {
        let numbers: Result<Vec<Vec<f32>>, ModelError> =
            parts.iter().map(|(name, len)| self.weights.floats(name, &[*len], 0..*len)).collect();
        Memory::of(self.device, &numbers?.concat(), "a vector of the weights")
    }

    /// Matrices of the same inputs, by name and outputs, one below the other.
    fn matrix(&self, parts: &[(String, usize)], inputs: usize) -> Result<Matrix, ModelError> {
        let outputs = parts.iter().map(|(_, outputs)| outputs).sum();
        let numbers = match self.format {
            WeightFormat::F32 => Numbers::F32(self.stack(parts, inputs, |number| number)?),
            WeightFormat::Bf16 => Numbers::Bf16(self.stack(parts, inputs, bf16::from_f32)?),
        };
        Ok(Matrix { numbers, outputs, inputs })
    }

    fn stack<T: DeviceRepr + ValidAsZeroBits>(
        &self,
        parts: &[(String, usize)],
        inputs: usize,
        number: impl Fn(f32) -> T,
    ) -> Result<Memory<T>, ModelError> {
        let all: usize = parts.iter().map(|(_, outputs)| outputs * inputs).sum();
        let mut memory = Memory::reserve(self.device, all, "the weights")?;
        let rows = (PIECE_NUMBERS / inputs).max(1);
        let mut next = 0;
        for (name, outputs) in parts {
            for first in (0..*outputs).step_by(rows) {
                let piece = first..(first + rows).min(*outputs);
                let floats = self.weights.floats(name, &[*outputs, inputs], piece)?;
                let numbers: Vec<T> = floats.into_iter().map(&number).collect();
                memory.write(self.device, next, &numbers)?;
                self.device.finish()?;
                next += numbers.len();
            }
        }
        Ok(memory)
    }
}
