//! The launches of one step, in the order of the paper: see `crates/model/src/llama.rs`.

use std::ops::Range;

use uniarm_model::{Columns, Config, Division, ModelError};

use crate::adapters::Group;
use crate::device::Argument::{Address, Integer};
use crate::device::{Argument, Device, Grid};
use crate::graphs::{Launcher, TOKENS_MAX};
use crate::llama::{Cache, CudaLlama, Rope};
use crate::memory::Memory;
use crate::peers::{LAYERS_IN_FLIGHT, Peers, Receivers};
use crate::product::Product;
use crate::sheet::Sheet;
use crate::weights::{Layer, LlamaWeights, Matrix, WeightFormat};
use crate::workspace::Buffers;

// As in the kernels.
pub(crate) const WARP: u32 = 32;
const ROW_THREADS: u32 = 256;
const ATTENTION_WARPS: u32 = 4;
const ADAPTER_THREADS: u32 = 256;

/// Linear layers of a group, at most.
const PARTS_MAX: usize = 3;

/// One step's view of the model.
struct Step<'a> {
    device: &'a Device,
    launcher: Launcher<'a>,
    config: &'a Config,
    division: &'a Division,
    weights: &'a LlamaWeights,
    rope: &'a Rope,
    cache: &'a Cache,
    sheet: &'a Sheet,
    /// None: there are no others.
    peers: Option<&'a mut Peers>,
    at: Buffers,
}

/// Rows that all ranks have whole, and of which each computes its columns.
#[derive(Clone, Copy)]
struct Gathered {
    columns: Columns,
    rows: usize,
    width: usize,
    address: u64,
}

impl CudaLlama {
    /// Computes what the sheet says, makes its lists, and fills `logits` with the rows that are wanted whole, (rows, vocabulary);
    /// a rank other than 0, which hands over its own, has room for none.
    pub(crate) fn step(&mut self, logits: &mut [f32]) -> Result<(), ModelError> {
        let Self { device, config, division, weights, rope, cache, workspace, sheet, .. } = self;
        let (lister, mut graphs) = (&mut self.lister, self.graphs.as_mut());
        let mut peers = self.peers.as_mut().filter(|peers| peers.has_others());
        let at = workspace.reserve(device, (config, division), sheet, peers.is_some())?;
        // What peers hand over stands between the launches.
        graphs = graphs.filter(|_| peers.is_none() && sheet.tokens <= TOKENS_MAX);
        let launcher = match &mut graphs {
            Some(graphs) => Launcher::List(graphs.record()),
            None => Launcher::Device(device),
        };
        let others = peers.as_deref_mut();
        let mut step =
            Step { device, launcher, config, division, weights, rope, cache, sheet, peers: others, at };
        step.embed()?;
        for (index, layer) in weights.layers.iter().enumerate() {
            step.attention(index, layer)?;
            step.mlp(index, layer)?;
            if (index + 1).is_multiple_of(LAYERS_IN_FLIGHT) {
                step.keep_up()?;
            }
        }
        if sheet.wanted > 0 {
            let scores = step.head(lister.whole())?;
            if lister.lists() > 0 {
                lister.make((device, &mut step.launcher), scores, sheet.lists())?;
            }
        }
        if let Some(graphs) = graphs {
            // Safety: see `Step::launch`; what was given back since then, to reserve more, is named by none of these.
            unsafe { graphs.launch(device) }?;
        }
        if lister.lists() > 0 {
            lister.read(device)?;
        }
        if !logits.is_empty() {
            workspace.read_logits(device, logits.len())?;
        }
        // The one time that the host waits, but for what a group makes it wait for.
        match peers {
            None => device.finish()?,
            Some(peers) => peers.drain(device)?,
        }
        if !logits.is_empty() {
            logits.copy_from_slice(workspace.logits(logits.len()));
        }
        Ok(())
    }
}

// The blocks of a layer.
impl Step<'_> {
    fn embed(&mut self) -> Result<(), ModelError> {
        let (sheet, hidden) = (self.sheet, self.config.hidden);
        let Buffers { residual, parts, .. } = self.at;
        let table = self.weights.embedding();
        let table = (table.address(), table.format());
        let Some(rank) = self.peers.as_ref().map(|peers| peers.rank()) else {
            return self.look_up(table, (sheet.ids(), sheet.tokens), residual);
        };
        let own = sheet.owned()[rank].clone();
        if !own.is_empty() {
            self.look_up(table, (sheet.own_ids(), own.len()), parts + bytes(own.start * hidden))?;
        }
        let stretches = sheet.owned().iter().map(|tokens| tokens.start * hidden..tokens.end * hidden);
        let stretches: Vec<Range<usize>> = stretches.collect();
        if let Some(peers) = &mut self.peers {
            peers.spread(self.device, parts, &stretches, Receivers::All)?;
        }
        // The gathered rows are a table, too.
        self.look_up((parts, WeightFormat::F32), (sheet.order(), sheet.tokens), residual)
    }

    /// residual += output projection of the attention over the normalised residual.
    fn attention(&mut self, index: usize, layer: &Layer) -> Result<(), ModelError> {
        let (normed, qkv, tokens) = (self.at.normed, self.at.qkv, self.sheet.tokens);
        let attended = self.gathered(Columns::Queries, self.at.attended);
        self.normalise(&layer.attention_norm, (normed, tokens), 0)?;
        self.multiply(&layer.qkv, (normed, qkv, tokens), false)?;
        self.adapt((index, Group::Qkv), (normed, &layer.qkv), qkv)?;
        self.rotate_and_append(index, layer)?;
        self.attend(index, self.own(attended))?;
        self.gather_all(attended)?;
        self.add((index, Group::Output), (attended.address, &layer.output))
    }

    /// residual += down(silu(gate) · up) of the normalised residual.
    fn mlp(&mut self, index: usize, layer: &Layer) -> Result<(), ModelError> {
        let (normed, gate_up, tokens) = (self.at.normed, self.at.gate_up, self.sheet.tokens);
        let gated = self.gathered(Columns::Intermediate, self.at.gated);
        self.normalise(&layer.mlp_norm, (normed, tokens), 0)?;
        self.multiply(&layer.gate_up, (normed, gate_up, tokens), false)?;
        self.adapt((index, Group::GateUp), (normed, &layer.gate_up), gate_up)?;
        self.gate(self.own(gated))?;
        self.gather_all(gated)?;
        self.add((index, Group::Down), (gated.address, &layer.down))
    }

    /// residual += a projection of whole rows, with its adapters.
    fn add(&mut self, place: (usize, Group), (input, matrix): (u64, &Matrix)) -> Result<(), ModelError> {
        let residual = self.gathered(Columns::Hidden, self.at.residual);
        let own = self.own(residual);
        if self.parts(residual) != residual.address {
            // The sum goes on from the residual's own columns, in the order in which one GPU takes it.
            self.cut(residual, own)?;
        }
        self.multiply(matrix, (input, own, residual.rows), true)?;
        self.adapt(place, (input, matrix), own)?;
        self.gather_all(residual)
    }

    /// Logits of the wanted tokens, in the sheet's order; the first `whole` rows of them come together. Returns where this rank's
    /// part of the others lies.
    fn head(&mut self, whole: usize) -> Result<u64, ModelError> {
        let LlamaWeights { norm, head, .. } = self.weights;
        let (normed, wanted) = (self.at.normed, self.sheet.wanted);
        let logits = Gathered {
            columns: Columns::Vocabulary,
            rows: wanted,
            width: self.config.vocabulary,
            address: self.at.logits,
        };
        let own = self.own(logits);
        self.normalise(norm, (normed, wanted), self.sheet.wanted_rows())?;
        self.multiply(head, (normed, own, wanted), false)?;
        if whole > 0 {
            self.gather(logits, whole, Receivers::Leader)?;
        }
        Ok(own + bytes(whole * head.outputs))
    }
}

// The other ranks.
impl Step<'_> {
    /// Rows of all tokens.
    fn gathered(&self, columns: Columns, address: u64) -> Gathered {
        let width = match columns {
            Columns::Queries => self.config.heads * self.config.head_dim,
            Columns::Hidden => self.config.hidden,
            Columns::Intermediate => self.config.intermediate,
            Columns::Vocabulary => self.config.vocabulary,
        };
        Gathered { columns, rows: self.sheet.tokens, width, address }
    }

    /// Where the parts of all ranks meet: a single row of them is the row.
    fn parts(&self, gathered: Gathered) -> u64 {
        match self.peers.is_none() || gathered.rows == 1 {
            true => gathered.address,
            false => self.at.parts,
        }
    }

    /// Where this rank's columns are computed.
    fn own(&self, gathered: Gathered) -> u64 {
        let first = self.division.columns(gathered.columns).start;
        self.parts(gathered) + bytes(gathered.rows * first)
    }

    /// Gives all ranks what all have computed.
    fn gather_all(&mut self, gathered: Gathered) -> Result<(), ModelError> {
        self.gather(gathered, gathered.rows, Receivers::All)
    }

    /// Gives the receivers the first `count` rows of what all ranks have computed.
    fn gather(&mut self, gathered: Gathered, count: usize, receivers: Receivers) -> Result<(), ModelError> {
        let parts = self.parts(gathered);
        let Gathered { columns, rows, .. } = gathered;
        let Some(peers) = &mut self.peers else { return Ok(()) };
        peers.gather(self.device, (columns, rows, count), parts, receivers)?;
        let bounds = peers.bounds(columns);
        match parts == gathered.address || receivers == Receivers::Leader && !peers.leads() {
            true => Ok(()),
            false => self.place(gathered, count, bounds),
        }
    }

    /// Waits for the device, where a peer could keep it from taking more.
    fn keep_up(&mut self) -> Result<(), ModelError> {
        self.peers.as_mut().map_or(Ok(()), |peers| peers.drain(self.device))
    }

    fn cut(&mut self, whole: Gathered, part: u64) -> Result<(), ModelError> {
        let own = self.division.columns(whole.columns);
        let arguments = [
            Address(whole.address),
            Address(part),
            integer(own.start),
            integer(own.len()),
            integer(whole.width),
        ];
        self.launch("cut", columns_of_rows(whole.rows, own.len()), &arguments)
    }

    /// The first `count` rows.
    fn place(&mut self, whole: Gathered, count: usize, bounds: u64) -> Result<(), ModelError> {
        let arguments = [
            Address(self.at.parts),
            Address(bounds),
            Address(whole.address),
            integer(whole.rows),
            integer(whole.width),
        ];
        self.launch("place", columns_of_rows(count, whole.width), &arguments)
    }
}

// The launches.
impl Step<'_> {
    /// output = rows of a table, by their numbers.
    fn look_up(
        &mut self,
        (table, format): (u64, WeightFormat),
        (ids, count): (u64, usize),
        output: u64,
    ) -> Result<(), ModelError> {
        let name = match format {
            WeightFormat::F32 => "embed_f32",
            WeightFormat::Bf16 => "embed_bf16",
        };
        let arguments = [Address(table), Address(ids), Address(output), integer(self.config.hidden)];
        self.launch(name, Grid { blocks: [count, 1, 1], threads: ROW_THREADS }, &arguments)
    }

    /// normed = norm of the residual; of the tokens in `rows` alone where that is not 0.
    fn normalise(
        &mut self,
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
            Argument::float(self.config.rms_norm_epsilon),
        ];
        self.launch("rms_norm", Grid { blocks: [count, 1, 1], threads: ROW_THREADS }, &arguments)
    }

    /// output = input · weightᵀ, or += where `add` is set.
    fn multiply(&mut self, weight: &Matrix, at: (u64, u64, usize), add: bool) -> Result<(), ModelError> {
        let Product { kernel, grid, arguments } = Product::new(weight, at, add);
        self.launch(kernel, grid, &arguments)
    }

    fn rotate_and_append(&mut self, index: usize, layer: &Layer) -> Result<(), ModelError> {
        let (keys, values) = self.cache.layer(index);
        let (heads, kv_heads) = (self.division.heads.len(), self.division.kv_heads.len());
        let head_dim = self.config.head_dim;
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
            Argument::float(1.0 / (head_dim as f32).sqrt()),
        ];
        self.launch("rotate_and_append", self.rows(), &arguments)
    }

    fn attend(&mut self, index: usize, attended: u64) -> Result<(), ModelError> {
        let (keys, values) = self.cache.layer(index);
        let head_dim = self.config.head_dim;
        let group = self.config.heads / self.config.kv_heads;
        let Division { heads: own, kv_heads: own_kv, .. } = self.division;
        let (heads, kv_heads) = (own.len(), own_kv.len());
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
            Address(attended),
            integer(heads),
            integer(own.start - own_kv.start * group),
            integer(group),
            integer(kv_heads),
            integer(head_dim),
            integer(self.cache.block_tokens),
        ];
        let blocks = [self.sheet.tokens, heads, 1];
        self.launch(name, Grid { blocks, threads: ATTENTION_WARPS * WARP }, &arguments)
    }

    fn gate(&mut self, gated: u64) -> Result<(), ModelError> {
        let own = self.division.columns(Columns::Intermediate).len();
        let arguments = [Address(self.at.gate_up), Address(gated), integer(own)];
        self.launch("gate", columns_of_rows(self.sheet.tokens, own), &arguments)
    }

    /// Adds the adapters of all tokens that have one to a projection's output.
    fn adapt(
        &mut self,
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
        let row = |address: u64, width: usize| address + bytes(first * width);
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

    fn launch(&mut self, name: &'static str, grid: Grid, arguments: &[Argument]) -> Result<(), ModelError> {
        // Safety: each call above has its kernel's arguments, of memory that the model keeps; all of it runs on one
        // stream, in order.
        unsafe { self.launcher.launch(name, grid, arguments) }
    }
}

/// A thread for each column of each row.
fn columns_of_rows(rows: usize, columns: usize) -> Grid {
    Grid { blocks: [rows, columns.div_ceil(ROW_THREADS as usize), 1], threads: ROW_THREADS }
}

fn bytes(numbers: usize) -> u64 {
    (numbers * size_of::<f32>()) as u64
}

/// Dimensions have less than 24 bits each, and widths of rows less than 31.
pub(crate) fn integer(number: usize) -> Argument {
    Integer(i32::try_from(number).expect("dimensions of a checked model"))
}
