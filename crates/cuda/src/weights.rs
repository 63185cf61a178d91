//! Weights on the device, as rows of outputs, a rank's own ones; projections that share an input are one matrix.

use std::ops::Range;

use cudarc::driver::{DeviceRepr, ValidAsZeroBits};
use half::bf16;
use uniarm_model::{Config, Division, Linear, ModelError, ModelFiles, Part, Weights};

use crate::device::Device;
use crate::memory::Memory;

/// Numbers that are decoded and copied at a time: a matrix at once would take gigabytes of the host.
const PIECE_NUMBERS: usize = 1 << 24;

/// From which version on devices multiply bf16 on tensor cores: that of an A100.
const BF16_CAPABILITY: (u32, u32) = (8, 0);

/// How the device holds weights. Norms, biases, adapters, activations and sums are f32 in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightFormat {
    /// As exact as the file, for files of at most 32 bits.
    F32,
    /// Half the bytes, and so nearly half the time of a step over few rows. Exact for files of bf16. For devices of version 8.0 or
    /// later.
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
    /// (own vocabulary, hidden), in the first stage; none where the output projection is tied to it.
    embedding: Option<Matrix>,
    /// Of this stage.
    pub layers: Vec<Layer>,
    pub norm: Memory<f32>,
    /// (own vocabulary, hidden), in the last stage; in the first one too where it is the embedding as well.
    head: Option<Matrix>,
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

/// A tensor of the files, and which of its outputs are wanted.
struct Tensor {
    name: String,
    outputs: usize,
    own: Range<usize>,
}

/// Where weights come from, and where they go.
struct Loader<'a> {
    device: &'a Device,
    weights: &'a Weights,
    config: &'a Config,
    division: &'a Division,
    format: WeightFormat,
}

impl WeightFormat {
    /// Refuses a device that cannot multiply with weights of this format.
    pub(crate) fn check(self, device: &Device) -> Result<(), ModelError> {
        let (major, minor) = device.capability();
        if self == Self::F32 || (major, minor) >= BF16_CAPABILITY {
            return Ok(());
        }
        let (name, needed) = (device.name(), BF16_CAPABILITY);
        Err(ModelError::Device(format!(
            "weights of bf16 need tensor cores of compute capability {}.{} or later, and {name} has {major}.{minor}: take \
             --gpu-weights f32",
            needed.0, needed.1
        )))
    }
}

impl LlamaWeights {
    /// What a rank holds; nothing else is read.
    pub fn load(
        device: &Device,
        files: &ModelFiles,
        format: WeightFormat,
        (part, division): (Part, &Division),
    ) -> Result<Self, ModelError> {
        format.check(device)?;
        let ModelFiles { config, weights, .. } = files;
        let loader = Loader { device, weights, config, division, format };
        let Config { vocabulary, hidden, .. } = *config;
        let table = |name: &str| {
            let own = division.vocabulary.clone();
            loader.matrix(&[Tensor { name: name.to_owned(), outputs: vocabulary, own }], hidden)
        };
        let [embedding, head] = part.tables(config).map(|name| name.map(table).transpose());
        let (embedding, head) = (embedding?, head?);
        let layers: Result<Vec<Layer>, ModelError> =
            part.layers(config).map(|layer| loader.layer(layer)).collect();
        let norm = loader.vector(&[Tensor::whole("model.norm.weight".to_owned(), hidden)])?;
        Ok(Self { embedding, layers: layers?, norm, head })
    }

    /// Of a rank of the first stage.
    pub fn embedding(&self) -> &Matrix {
        self.embedding.as_ref().or(self.head.as_ref()).expect("the first stage has the embeddings")
    }

    /// Of a rank of the last stage.
    pub fn head(&self) -> &Matrix {
        self.head.as_ref().expect("the last stage has the output projection")
    }

    /// Bytes that a step over few rows reads: all matrices once.
    pub fn bytes(&self) -> usize {
        let layers = self.layers.iter();
        let matrices = layers.flat_map(|layer| [&layer.qkv, &layer.output, &layer.gate_up, &layer.down]);
        matrices.chain(&self.head).map(Matrix::bytes).sum()
    }
}

impl Matrix {
    /// Of numbers by themselves, (outputs, inputs).
    pub fn of(
        device: &Device,
        (numbers, inputs): (&[f32], usize),
        format: WeightFormat,
    ) -> Result<Self, ModelError> {
        let outputs = numbers.len() / inputs;
        let what = "the weights";
        let numbers = match format {
            WeightFormat::F32 => Numbers::F32(Memory::of(device, numbers, what)?),
            WeightFormat::Bf16 => {
                let halves: Vec<bf16> = numbers.iter().copied().map(bf16::from_f32).collect();
                Numbers::Bf16(Memory::of(device, &halves, what)?)
            }
        };
        Ok(Self { numbers, outputs, inputs })
    }

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

impl Tensor {
    fn whole(name: String, outputs: usize) -> Self {
        Self { name, outputs, own: 0..outputs }
    }
}

impl Loader<'_> {
    fn layer(&self, layer: usize) -> Result<Layer, ModelError> {
        let Config { hidden, intermediate, heads, head_dim, qkv_bias, .. } = *self.config;
        let name = |suffix: &str| format!("model.layers.{layer}.{suffix}");
        let parts = |linear: &[Linear], kind: &str| -> Vec<Tensor> {
            let part = |linear: &Linear| Tensor {
                name: name(&format!("{}.{kind}", linear.name())),
                outputs: linear.outputs(self.config),
                own: self.division.outputs(*linear).rows,
            };
            linear.iter().map(part).collect()
        };
        let norm = |suffix: &str| self.vector(&[Tensor::whole(name(suffix), hidden)]);
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

    /// Vectors, one after the other.
    fn vector(&self, parts: &[Tensor]) -> Result<Memory<f32>, ModelError> {
        let numbers: Result<Vec<Vec<f32>>, ModelError> = parts
            .iter()
            .map(|Tensor { name, outputs, own }| self.weights.floats(name, &[*outputs], own.clone()))
            .collect();
        Memory::of(self.device, &numbers?.concat(), "a vector of the weights")
    }

    /// Matrices of the same inputs, one below the other.
    fn matrix(&self, parts: &[Tensor], inputs: usize) -> Result<Matrix, ModelError> {
        let outputs = parts.iter().map(|part| part.own.len()).sum();
        let numbers = match self.format {
            WeightFormat::F32 => Numbers::F32(self.stack(parts, inputs, |number| number)?),
            WeightFormat::Bf16 => Numbers::Bf16(self.stack(parts, inputs, bf16::from_f32)?),
        };
        Ok(Matrix { numbers, outputs, inputs })
    }

    fn stack<T: DeviceRepr + ValidAsZeroBits>(
        &self,
        parts: &[Tensor],
        inputs: usize,
        number: impl Fn(f32) -> T,
    ) -> Result<Memory<T>, ModelError> {
        let all: usize = parts.iter().map(|part| part.own.len() * inputs).sum();
        let mut memory = Memory::reserve(self.device, all, "the weights")?;
        let rows = (PIECE_NUMBERS / inputs).max(1);
        let mut next = 0;
        for Tensor { name, outputs, own } in parts {
            for first in own.clone().step_by(rows) {
                let piece = first..(first + rows).min(own.end);
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
