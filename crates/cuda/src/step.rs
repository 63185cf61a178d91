//! The launches of one step, in the order of the paper: see `crates/model/src/llama.rs`.

use uniarm_model::{Config, ModelError};

use crate::adapters::Group;
use crate::device::Argument::{Address, Float, Integer};
use crate::device::{Argument, Device, Grid};
use crate::llama::{Cache, CudaLlama, Rope};
use crate::memory::{Growing, Memory};
use crate::sheet::Sheet;
use crate::weights::{Layer, LlamaWeights, Matrix, WeightFormat};

// As in the kernels.
const WARP: u32 = 32;
const MATMUL_WARPS: u32 = 8;
const MATMUL_COLUMNS: usize = 2;
const ROW_THREADS: u32 = 256;
const ATTENTION_WARPS: u32 = 4;
const ADAPTER_THREADS: u32 = 256;

/// Linear layers of a group, at most.
const PARTS_MAX: usize = 3;

/// Activations of a step, (tokens, …) each; grown to the largest step seen.
pub(crate) struct Workspace {
    /// The residual stream: (tokens, hidden)
    residual: Growing<f32>,
    /// (tokens, hidden)
    normed: Growing<f32>,
    /// (tokens, queries + 2 × keys)
    qkv: Growing<f32>,
    /// (tokens, queries)
    attended: Growing<f32>,
    /// (tokens, 2 × intermediate)
    gate_up: Growing<f32>,
    /// (tokens, intermediate)
    gated: Growing<f32>,
    /// A · x of adapters: (adapted tokens, ranks)
    features: Growing<f32>,
    /// (wanted tokens, vocabulary)
    logits: Growing<f32>,
}

/// Where the activations of this step lie.
struct Buffers {
    residual: u64,
    normed: u64,
    qkv: u64,
    attended: u64,
    gate_up: u64,
    gated: u64,
    features: u64,
}

/// One step's view of the model.
struct Step<'a> {
    device: &'a Device,
    config: &'a Config,
    weights: &'a LlamaWeights,
    rope: &'a Rope,
    cache: &'a Cache,
    sheet: &'a Sheet,
    at: Buffers,
}

impl CudaLlama {
    /// Computes what the sheet says and fills `logits`, (wanted, vocabulary).
    pub(crate) fn step(&mut self, logits: &mut [f32]) -> Result<(), ModelError> {
        let Self { device, config, weights, rope, cache, workspace, sheet, .. } = self;
        let at = workspace.reserve(device, config, sheet)?;
        let step = Step { device, config, weights, rope, cache, sheet, at };
        step.embed()?;
        for (index, layer) in weights.layers.iter().enumerate() {
            step.attention(index, layer)?;
            step.mlp(index, layer)?;
        }
        if sheet.wanted == 0 {
            return device.finish();
        }
        let numbers = sheet.wanted.next_power_of_two() * config.vocabulary;
        let computed = workspace.logits.reserve(device, numbers, "logits")?;
        step.head(computed.at(0))?;
        computed.read(device, logits)
    }
}

impl Workspace {
    pub const fn new() -> Self {
        Self {
            residual: Growing::new(),
            normed: Growing::new(),
            qkv: Growing::new(),
            attended: Growing::new(),
            gate_up: Growing::new(),
            gated: Growing::new(),
            features: Growing::new(),
            logits: Growing::new(),
        }
    }

    fn reserve(&mut self, device: &Device, config: &Config, sheet: &Sheet) -> Result<Buffers, ModelError> {
        // Steps of nearly one size shall not each allocate.
        let tokens = sheet.tokens.next_power_of_two();
        let (queries, keys) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let reserve = |memory: &mut Growing<f32>, width: usize| {
            memory.reserve(device, tokens * width, "a step's activations").map(|memory| memory.at(0))
        };
        Ok(Buffers {
            residual: reserve(&mut self.residual, config.hidden)?,
            normed: reserve(&mut self.normed, config.hidden)?,
            qkv: reserve(&mut self.qkv, queries + 2 * keys)?,
            attended: reserve(&mut self.attended, queries)?,
            gate_up: reserve(&mut self.gate_up, 2 * config.intermediate)?,
            gated: reserve(&mut self.gated, config.intermediate)?,
            features: match sheet.adapted {
                0 => 0,
                _ => reserve(&mut self.features, sheet.ranks_max())?,
            },
        })
    }
}

// The blocks of a layer.
impl Step<'_> {
    fn embed(&self) -> Result<(), ModelError> {
        let table = self.weights.embedding();
        let name = match table.format() {
            WeightFormat::F32 => "embed_f32",
            WeightFormat::Bf16 => "embed_bf16",
        };
        let arguments = [
            Address(table.address()),
            Address(self.sheet.ids()),
            Address(self.at.residual),
            integer(table.inputs),
        ];
        self.launch(name, self.rows(), &arguments)
    }

    /// residual += output projection of the attention over the normalised residual.
    fn attention(&self, index: usize, layer: &Layer) -> Result<(), ModelError> {
        let at = &self.at;
        self.normalise(&layer.attention_norm, (at.normed, self.sheet.tokens), 0)?;
        self.multiply(&layer.qkv, (at.normed, at.qkv, self.sheet.tokens), false)?;
        self.adapt((index, Group::Qkv), (at.normed, &layer.qkv), at.qkv)?;
        self.rotate_and_append(index, layer)?;
        self.attend(index)?;
        self.multiply(&layer.output, (at.attended, at.residual, self.sheet.tokens), true)?;
        self.adapt((index, Group::Output), (at.attended, &layer.output), at.residual)
    }

    /// residual += down(silu(gate) · up) of the normalised residual.
    fn mlp(&self, index: usize, layer: &Layer) -> Result<(), ModelError> {
        let at = &self.at;
        self.normalise(&layer.mlp_norm, (at.normed, self.sheet.tokens), 0)?;
        self.multiply(&layer.gate_up, (at.normed, at.gate_up, self.sheet.tokens), false)?;
        self.adapt((index, Group::GateUp), (at.normed, &layer.gate_up), at.gate_up)?;
        self.gate()?;
        self.multiply(&layer.down, (at.gated, at.residual, self.sheet.tokens), true)?;
        self.adapt((index, Group::Down), (at.gated, &layer.down), at.residual)
    }

    /// Logits of the wanted tokens, in the caller's order.
    fn head(&self, logits: u64) -> Result<(), ModelError> {
        let LlamaWeights { norm, head, .. } = self.weights;
        self.normalise(norm, (self.at.normed, self.sheet.wanted), self.sheet.wanted_rows())?;
        self.multiply(head, (self.at.normed, logits, self.sheet.wanted), false)
    }
}

// The launches.
impl Step<'_> {
    /// normed = norm of the residual; of the tokens in `rows` alone where that is not 0.
    fn normalise(
        &self,
        weight: &Memory<f32>,
        (normed, count): (u64, usize),
        rows: u64,
    ) -> Result<(), ModelError> {
        let arguments = [
            Address(self.at.residual),
            Address(rows),
            Address(weight.at(0)),
            Address(normed),
            integer(self.config.hidden),
            Float(self.config.rms_norm_epsilon),
        ];
        self.launch("rms_norm", Grid { blocks: [count, 1, 1], threads: ROW_THREADS }, &arguments)
    }

    /// output = input · weightᵀ, or += where `add` is set.
    fn multiply(
        &self,
        weight: &Matrix,
        (input, output, rows): (u64, u64, usize),
        add: bool,
    ) -> Result<(), ModelError> {
        // More rows to a warp than there are would be computed for nothing; no sum depends on the choice.
        let together = rows.next_power_of_two().min(8);
        let name = match (weight.format(), together) {
            (WeightFormat::F32, 1) => "matmul_f32_1",
            (WeightFormat::F32, 2) => "matmul_f32_2",
            (WeightFormat::F32, 4) => "matmul_f32_4",
            (WeightFormat::F32, _) => "matmul_f32_8",
            (WeightFormat::Bf16, 1) => "matmul_bf16_1",
            (WeightFormat::Bf16, 2) => "matmul_bf16_2",
            (WeightFormat::Bf16, 4) => "matmul_bf16_4",
            (WeightFormat::Bf16, _) => "matmul_bf16_8",
        };
        let columns = MATMUL_COLUMNS * MATMUL_WARPS as usize;
        let blocks = [weight.outputs.div_ceil(columns), rows.div_ceil(together), 1];
        let arguments = [
            Address(weight.address()),
            Address(input),
            Address(output),
            integer(rows),
            integer(weight.inputs),
            integer(weight.outputs),
            Integer(i32::from(add)),
        ];
        self.launch(name, Grid { blocks, threads: MATMUL_WARPS * WARP }, &arguments)
    }

    fn rotate_and_append(&self, index: usize, layer: &Layer) -> Result<(), ModelError> {
        let (keys, values) = self.cache.layer(index);
        let Config { heads, kv_heads, head_dim, .. } = *self.config;
        let arguments = [
            Address(self.at.qkv),
            Address(layer.qkv_bias.as_ref().map_or(0, |bias| bias.at(0))),
            Address(self.sheet.positions()),
            Address(self.sheet.slots()),
            Address(self.rope.cosine.at(0)),
            Address(self.rope.sine.at(0)),
            Address(keys),
            Address(values),
            integer(heads),
            integer(kv_heads),
            integer(head_dim),
            Float(1.0 / (head_dim as f32).sqrt()),
        ];
        self.launch("rotate_and_append", self.rows(), &arguments)
    }

    fn attend(&self, index: usize) -> Result<(), ModelError> {
        let (keys, values) = self.cache.layer(index);
        let Config { heads, kv_heads, head_dim, .. } = *self.config;
        let name = match head_dim {
            0..=32 => "attention_32",
            33..=64 => "attention_64",
            65..=128 => "attention_128",
            _ => "attention_256",
        };
        let arguments = [
            Address(self.at.qkv),
            integer((heads + 2 * kv_heads) * head_dim),
            Address(keys),
            Address(values),
            Address(self.sheet.positions()),
            Address(self.sheet.tables()),
            Address(self.sheet.blocks()),
            Address(self.at.attended),
            integer(heads),
            integer(kv_heads),
            integer(head_dim),
            integer(self.cache.block_tokens),
        ];
        let blocks = [self.sheet.tokens, heads, 1];
        self.launch(name, Grid { blocks, threads: ATTENTION_WARPS * WARP }, &arguments)
    }

    fn gate(&self) -> Result<(), ModelError> {
        let intermediate = self.config.intermediate;
        let blocks = [self.sheet.tokens, intermediate.div_ceil(ROW_THREADS as usize), 1];
        let arguments = [Address(self.at.gate_up), Address(self.at.gated), integer(intermediate)];
        self.launch("gate", Grid { blocks, threads: ROW_THREADS }, &arguments)
    }

    /// Adds the adapters of all tokens that have one to a projection's output.
    fn adapt(
        &self,
        (layer, group): (usize, Group),
        (input, matrix): (u64, &Matrix),
        output: u64,
    ) -> Result<(), ModelError> {
        let index = layer * Group::COUNT + group as usize;
        if self.sheet.adapted == 0 || self.sheet.extent(index).ranks == 0 {
            return Ok(());
        }
        let (sheet, extent) = (self.sheet, self.sheet.extent(index));
        let first = sheet.tokens - sheet.adapted;
        let row = |address: u64, width: usize| address + (first * width * size_of::<f32>()) as u64;
        let (tables, stride) = (sheet.adapters(), integer(sheet.ranks_max()));
        let arguments = [
            Address(tables),
            integer(index),
            Address(row(input, matrix.inputs)),
            integer(matrix.inputs),
            Address(self.at.features),
            stride,
        ];
        let warps = (ADAPTER_THREADS / WARP) as usize;
        let blocks = [sheet.adapted, extent.ranks.div_ceil(warps), 1];
        self.launch("adapter_down", Grid { blocks, threads: ADAPTER_THREADS }, &arguments)?;
        let arguments = [
            Address(tables),
            integer(index),
            Address(sheet.states()),
            Address(sheet.floats()),
            Address(self.at.features),
            integer(sheet.ranks_max()),
            Address(row(output, matrix.outputs)),
            integer(matrix.outputs),
        ];
        let blocks = [sheet.adapted, extent.outputs.div_ceil(ADAPTER_THREADS as usize), PARTS_MAX];
        self.launch("adapter_up", Grid { blocks, threads: ADAPTER_THREADS }, &arguments)
    }

    /// A block for each token.
    fn rows(&self) -> Grid {
        Grid { blocks: [self.sheet.tokens, 1, 1], threads: ROW_THREADS }
    }

    fn launch(&self, name: &str, grid: Grid, arguments: &[Argument]) -> Result<(), ModelError> {
        // Safety: each call above has its kernel's arguments, of memory that the model keeps; all of it runs on one
        // stream, in order.
        unsafe { self.device.launch(name, grid, arguments) }
    }
}

/// Dimensions have less than 24 bits each, and widths of rows less than 31.
fn integer(number: usize) -> Argument {
    Integer(i32::try_from(number).expect("dimensions of a checked model"))
}
