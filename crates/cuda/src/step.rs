//! The launches of one step, in the order of the paper: see `crates/model/src/llama.rs`.

use std::ops::Range;

use uniarm_model::{Columns, Config, Division, KvFormat, ModelError, Part};

use crate::adapters::Group;
use crate::device::Argument::{Address, Integer};
use crate::device::{Argument, Device, Grid};
use crate::graphs::{Launcher, TOKENS_MAX};
use crate::lister::Lister;
use crate::llama::{Cache, CudaLlama, Rope};
use crate::memory::Memory;
use crate::peers::{LAYERS_IN_FLIGHT, Peers, Receivers};
use crate::product::Product;
use crate::sheet::Sheet;
use crate::weights::{Layer, LlamaWeights, Matrix, WeightFormat};
use crate::workspace::{Buffers, Room};

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
    part: Part,
    division: &'a Division,
    weights: &'a LlamaWeights,
    rope: &'a Rope,
    cache: &'a Cache,
    /// The micro-batch that is computed.
    sheet: &'a Sheet,
    /// None: there are no others.
    peers: Option<&'a mut Peers>,
    at: Buffers,
}

/// Rows that all ranks of a stage have whole, and of which each computes its columns.
#[derive(Clone, Copy)]
struct Gathered {
    columns: Columns,
    rows: usize,
    width: usize,
    address: u64,
}

impl CudaLlama {
    /// Computes what the sheets of so many micro-batches say, makes the step's lists, and fills `logits` with the rows that are
    /// wanted whole, (rows, vocabulary); a rank other than 0, which hands over its own, has room for none.
    pub(crate) fn step(&mut self, batches: usize, logits: &mut [f32]) -> Result<(), ModelError> {
        let room = self.room(logits.len());
        let Self { device, config, part, division, weights, rope, cache, workspace, sheets, .. } = self;
        let (lister, mut graphs) = (&mut self.lister, self.graphs.as_mut());
        let mut peers = self.peers.as_mut().filter(|peers| peers.has_others());
        let sheets = &sheets[..batches];
        let at = workspace.reserve(device, (config, division), (sheets, room))?;
        lister.make_room(device)?;
        let sheet = sheets.first().expect("a step has a token");
        // What peers hand over stands between the launches.
        graphs = graphs.filter(|_| peers.is_none() && sheet.tokens <= TOKENS_MAX);
        let launcher = match &mut graphs {
            Some(graphs) => Launcher::List(graphs.record()),
            None => Launcher::Device(device),
        };
        let (part, others) = (*part, peers.as_deref_mut());
        let mut step =
            Step { device, launcher, config, part, division, weights, rope, cache, sheet, peers: others, at };
        step.layers(sheets)?;
        if lister.positions() > 0 {
            step.head(lister)?;
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

    /// For a step of which so many numbers come to the host.
    fn room(&self, read: usize) -> Room {
        let wanted = if self.part.is_last_stage() { self.lister.positions() } else { 0 };
        let in_parts = self.peers.as_ref().is_some_and(Peers::has_fellows);
        Room { wanted, logits: wanted.max(read / self.config.vocabulary), read, in_parts }
    }
}

// From tokens to logits.
impl<'a> Step<'a> {
    /// All layers of this stage, for one micro-batch after the other.
    fn layers(&mut self, sheets: &'a [Sheet]) -> Result<(), ModelError> {
        let mut in_flight = 0;
        for sheet in sheets {
            self.sheet = sheet;
            self.begin()?;
            for (index, layer) in self.weights.layers.iter().enumerate() {
                self.attention(index, layer)?;
                self.mlp(index, layer)?;
                in_flight += 1;
                if in_flight == LAYERS_IN_FLIGHT {
                    self.keep_up()?;
                    in_flight = 0;
                }
            }
            match self.part.is_last_stage() {
                true => self.keep_wanted()?,
                false => self.pass_on()?,
            }
        }
        Ok(())
    }

    /// residual = embeddings, or what the stage before made of them.
    fn begin(&mut self) -> Result<(), ModelError> {
        match self.part.is_first_stage() {
            true => self.embed(),
            false => self.take_over(),
        }
    }

    fn embed(&mut self) -> Result<(), ModelError> {
        let (sheet, hidden) = (self.sheet, self.config.hidden);
        let Buffers { residual, parts, .. } = self.at;
        let table = self.weights.embedding();
        let table = (table.address(), table.format());
        if !self.has_fellows() {
            return self.look_up(table, (sheet.ids(), sheet.tokens), residual);
        }
        let own = sheet.owned()[self.part.place()].clone();
        if !own.is_empty() {
            self.look_up(table, (sheet.own_ids(), own.len()), parts + bytes(own.start * hidden))?;
        }
        let stretches = sheet.owned().iter().map(|tokens| tokens.start * hidden..tokens.end * hidden);
        let stretches: Vec<Range<usize>> = stretches.collect();
        if let Some(peers) = &mut self.peers {
            peers.spread(self.device, parts, &stretches, Receivers::Stage)?;
        }
        // The gathered rows are a table, too.
        self.look_up((parts, WeightFormat::F32), (sheet.order(), sheet.tokens), residual)
    }

    /// Keeps the normalised rows of the wanted tokens, for the product with all of the step's: the output projection is read once.
    fn keep_wanted(&mut self) -> Result<(), ModelError> {
        let (hidden, [whole, listed]) = (self.config.hidden, self.sheet.places_of_logits.clone());
        // Of a step that is not cut both kinds stand together.
        let runs = match whole.end == listed.start {
            true => [whole.start..listed.end, 0..0],
            false => [whole, listed],
        };
        let mut rows = self.sheet.wanted_rows();
        for run in runs.into_iter().filter(|run| !run.is_empty()) {
            let last = self.at.last + bytes(run.start * hidden);
            self.normalise(&self.weights.norm, (last, run.len()), rows)?;
            rows += bytes(run.len());
        }
        Ok(())
    }

    /// Logits of the step's wanted tokens, of which whole rows come together, and lists of the others.
    fn head(&mut self, lister: &mut Lister) -> Result<(), ModelError> {
        let (is_last, whole) = (self.part.is_last_stage(), lister.whole());
        let logits = Gathered {
            columns: Columns::Vocabulary,
            rows: if is_last { lister.positions() } else { whole },
            width: self.config.vocabulary,
            address: self.at.logits,
        };
        let own = self.own(logits);
        if is_last {
            self.multiply(self.weights.head(), (self.at.last, own, logits.rows), false)?;
        }
        if whole > 0 {
            self.gather(logits, whole, Receivers::Leader)?;
        }
        if is_last && lister.lists() > 0 {
            let scores = own + bytes(whole * self.division.columns(Columns::Vocabulary).len());
            lister.make((self.device, &mut self.launcher), scores, self.sheet.lists())?;
        }
        Ok(())
    }
}

// The blocks of a layer.
impl Step<'_> {
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

    /// Whether other ranks have parts of the same rows.
    fn has_fellows(&self) -> bool {
        self.peers.as_ref().is_some_and(|peers| peers.has_fellows())
    }

    /// Where the parts of all ranks meet: a single row of them is the row.
    fn parts(&self, gathered: Gathered) -> u64 {
        match !self.has_fellows() || gathered.rows == 1 {
            true => gathered.address,
            false => self.at.parts,
        }
    }

    /// Where this rank's columns are computed.
    fn own(&self, gathered: Gathered) -> u64 {
        let first = self.division.columns(gathered.columns).start;
        self.parts(gathered) + bytes(gathered.rows * first)
    }

    /// Gives all ranks of the stage what all of them have computed.
    fn gather_all(&mut self, gathered: Gathered) -> Result<(), ModelError> {
        match self.has_fellows() {
            true => self.gather(gathered, gathered.rows, Receivers::Stage),
            false => Ok(()),
        }
    }

    /// Gives the receivers the first `count` rows of what the ranks of a stage have computed.
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

    /// The next stage gets this rank's columns of the residual, which lie where they were computed.
    fn pass_on(&mut self) -> Result<(), ModelError> {
        let (own, count) = self.own_residual();
        self.peers.as_mut().map_or(Ok(()), |peers| peers.pass_on(self.device, own, count))
    }

    /// residual = that of the stage before, whose every rank hands over its columns.
    fn take_over(&mut self) -> Result<(), ModelError> {
        let (own, count) = self.own_residual();
        self.peers.as_mut().map_or(Ok(()), |peers| peers.take_over(self.device, own, count))?;
        self.gather_all(self.gathered(Columns::Hidden, self.at.residual))
    }

    /// This rank's columns of all tokens, and how many numbers they are.
    fn own_residual(&self) -> (u64, usize) {
        let residual = self.gathered(Columns::Hidden, self.at.residual);
        (self.own(residual), residual.rows * self.division.columns(Columns::Hidden).len())
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
        let name = match self.cache.format {
            KvFormat::F32 => "rotate_and_append_f32",
            KvFormat::F16 => "rotate_and_append_f16",
        };
        self.launch(name, self.rows(), &arguments)
    }

    fn attend(&mut self, index: usize, attended: u64) -> Result<(), ModelError> {
        let (keys, values) = self.cache.layer(index);
        let head_dim = self.config.head_dim;
        let group = self.config.heads / self.config.kv_heads;
        let Division { heads: own, kv_heads: own_kv, .. } = self.division;
        let (heads, kv_heads) = (own.len(), own_kv.len());
        let name = match (self.cache.format, head_dim) {
            (KvFormat::F32, 0..=32) => "attention_f32_32",
            (KvFormat::F32, 33..=64) => "attention_f32_64",
            (KvFormat::F32, 65..=128) => "attention_f32_128",
            (KvFormat::F32, _) => "attention_f32_256",
            (KvFormat::F16, 0..=32) => "attention_f16_32",
            (KvFormat::F16, 33..=64) => "attention_f16_64",
            (KvFormat::F16, 65..=128) => "attention_f16_128",
            (KvFormat::F16, _) => "attention_f16_256",
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
