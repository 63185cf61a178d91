//! The Llama family on the CPU: one step over any mixture of prefill chunks and decode rows.
//!
//! Llama (arXiv 2302.13971) and Qwen2 (arXiv 2407.10671) in the order of the paper: normalise, project to
//! queries, keys and values, rotate, attend over the paged cache, project back; normalise, gate, project
//! back; all with the fixed-order kernels of [`crate::kernels`], weights as they are stored. Shapes: m is the
//! number of tokens of the step, over all rows.

mod exchange;
mod listing;
mod load;
mod matrix;
mod micro;
mod plan;
mod step;

use std::sync::Arc;

use uniarm_collective::Collective;

use crate::config::Config;
use crate::division::{Division, Part};
use crate::error::ModelError;
use crate::forward::{Forward, Limits, Row};
use crate::kernels::attention::{KvFormat, LayerCache};
use crate::kernels::panels::Panels;
use crate::kernels::simd::{Isa, LANES};
use crate::kernels::team::Team;
use crate::kv::{KvCache, KvShape};
use crate::likeliest::{Likeliest, Lists, Ranking};
use crate::rope::RopeTable;
use crate::sharded::{Arithmetic, RankForward, Terms};
use crate::source::ModelFiles;

use exchange::Exchange;
pub use micro::micro_batches;
pub use plan::{Plan, Token};
use step::Workspace;

/// Tokens of a micro-batch, at least.
const MICRO_TOKENS_MIN: usize = 32;

/// What a model takes of the machine.
#[derive(Clone, Copy, Debug)]
pub struct LlamaOptions {
    /// Threads of its own.
    pub threads: usize,
    /// Blocks of the cache.
    pub kv_blocks: usize,
    /// Positions per block, a multiple of 16.
    pub block_tokens: usize,
    /// Whether the cache has all of its memory from the start. Else it comes when positions are first written, of all layers
    /// in one step: answers stop meanwhile, for most of a second where a virtual machine's own memory comes late.
    pub kv_at_once: bool,
}

/// Multiplications and additions by the kind of arithmetic, each with a peak of its own (see
/// [`machine`](crate::machine)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Operations {
    /// f32 with f32, or with what is widened to it.
    pub float: u64,
    /// Integers of at most 8 bits with integers of 16.
    pub integer: u64,
}

/// A loaded model with its cache and threads.
pub struct Llama {
    weights: Arc<LlamaWeights>,
    rope: Arc<RopeTable>,
    cache: KvCache,
    team: Team,
    isa: Isa,
    plan: Plan,
    workspace: Workspace,
    exchange: Exchange,
}

/// Frozen weights, packed for the kernels. Outputs of projections that share an input are concatenated.
struct LlamaWeights {
    config: Config,
    part: Part,
    /// Whose outputs these are: matrices have those of one rank, and all inputs.
    division: Division,
    fingerprint: [u8; 32],
    /// Of the cache.
    kv_format: KvFormat,
    /// (vocabulary, hidden), in the first stage; none where the output projection is tied to it.
    embedding: Option<Panels>,
    /// Of this stage.
    layers: Vec<Layer>,
    norm: Vec<f32>,
    /// (vocabulary, hidden), in the last stage; in the first one too where it is the embedding as well.
    head: Option<Panels>,
}

struct Layer {
    attention_norm: Vec<f32>,
    /// (queries + 2 × keys, hidden)
    qkv: Panels,
    /// (queries + 2 × keys)
    qkv_bias: Option<Vec<f32>>,
    /// (hidden, queries)
    output: Panels,
    mlp_norm: Vec<f32>,
    /// Gate, then up: (2 × intermediate, hidden)
    gate_up: Panels,
    /// (hidden, intermediate)
    down: Panels,
}

impl Default for LlamaOptions {
    fn default() -> Self {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Self { threads, kv_blocks: 1024, block_tokens: LANES, kv_at_once: false }
    }
}

impl Operations {
    /// A multiply-add for each number.
    fn of(panels: &Panels) -> Self {
        let count = 2 * (panels.inputs() * panels.outputs()) as u64;
        if panels.format().is_blocks() {
            Self { float: 0, integer: count }
        } else {
            Self { float: count, integer: 0 }
        }
    }
}

impl std::ops::Add for Operations {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { float: self.float + other.float, integer: self.integer + other.integer }
    }
}

impl LlamaWeights {
    /// The matrices that a step multiplies with.
    fn matrices(&self) -> impl Iterator<Item = &Panels> {
        let layers = self.layers.iter();
        layers.flat_map(|layer| [&layer.qkv, &layer.output, &layer.gate_up, &layer.down]).chain(&self.head)
    }
}

impl Llama {
    /// Packs the weights, in the number format of the files, and reserves the cache.
    ///
    /// # Errors
    /// [`ModelError::Unsupported`] for dimensions that the kernels do not take,
    /// [`ModelError::Invalid`] for options that make no model, and whatever reading the weights meets.
    pub fn load(files: &ModelFiles, options: &LlamaOptions) -> Result<Self, ModelError> {
        Self::over(Arc::new(LlamaWeights::load(files, false, Part::WHOLE)?), options)
    }

    /// One of the parts; it computes once it has a group.
    pub(crate) fn load_part(
        files: &ModelFiles,
        options: &LlamaOptions,
        part: Part,
    ) -> Result<Self, ModelError> {
        Self::over(Arc::new(LlamaWeights::load(files, false, part)?), options)
    }

    /// The same with all weights widened to f32, and activations kept so: what the error and the speed of
    /// quantised products are compared with.
    ///
    /// # Errors
    /// As [`Llama::load`].
    pub fn load_widened(files: &ModelFiles, options: &LlamaOptions) -> Result<Self, ModelError> {
        Self::over(Arc::new(LlamaWeights::load(files, true, Part::WHOLE)?), options)
    }

    /// Another model over the same weights, with a cache and threads of its own: base and reward role of one
    /// process read one copy.
    ///
    /// # Errors
    /// [`ModelError::Invalid`] for options that make no model.
    pub fn share(&self, options: &LlamaOptions) -> Result<Self, ModelError> {
        Self::over(self.weights.clone(), options)
    }

    /// The same model on another instruction set, with the same bits; for tests and measurements.
    pub fn with_isa(mut self, isa: Isa) -> Self {
        self.isa = isa;
        self
    }

    pub fn config(&self) -> &Config {
        &self.weights.config
    }

    /// [`ModelFiles::fingerprint`] of the weights.
    pub fn fingerprint(&self) -> &[u8; 32] {
        &self.weights.fingerprint
    }

    /// Bytes that a step over few rows reads: all matrices once.
    pub fn weight_bytes(&self) -> usize {
        self.weights.matrices().map(Panels::bytes).sum()
    }

    /// Operations of one token's products with all matrices; attention and whatever else comes on top.
    pub fn operations(&self) -> Operations {
        self.weights.matrices().fold(Operations::default(), |sum, matrix| sum + Operations::of(matrix))
    }

    /// Those of the output projection alone, which only tokens with wanted logits meet.
    pub fn head_operations(&self) -> Operations {
        self.weights.head.as_ref().map_or(Operations::default(), Operations::of)
    }

    /// Those of a token's attention to one position, in f32 over all layers: a product with its key, and one with its values.
    pub fn attention_operations(&self) -> Operations {
        let Config { layers, heads, head_dim, .. } = self.weights.config;
        Operations { float: (2 * 2 * layers * heads * head_dim) as u64, integer: 0 }
    }

    /// Bytes of a position's keys and values over all layers: what a cache of so many tokens takes.
    ///
    /// # Errors
    /// A projection is missing, or has a format that no kernel takes.
    pub fn kv_token_bytes(files: &ModelFiles) -> Result<usize, ModelError> {
        let Config { layers, kv_heads, head_dim, .. } = files.config;
        Ok(layers * LayerCache::block_numbers(kv_heads, head_dim, 1) * load::kv_format(files)?.bytes())
    }

    /// Bytes of one cache block over all layers.
    pub fn block_bytes(&self) -> usize {
        self.cache.shape().block_bytes()
    }

    fn over(weights: Arc<LlamaWeights>, options: &LlamaOptions) -> Result<Self, ModelError> {
        let LlamaOptions { threads, kv_blocks, block_tokens, kv_at_once } = *options;
        let invalid = |field, reason| Err(ModelError::Invalid { field, reason });
        if block_tokens == 0 || !block_tokens.is_multiple_of(LANES) {
            return invalid("block_tokens", format!("{block_tokens} is not a multiple of {LANES}"));
        }
        if kv_blocks == 0 || u32::try_from(kv_blocks).is_err() {
            return invalid("kv_blocks", format!("a cache of {kv_blocks} blocks"));
        }
        let config = &weights.config;
        let shape = KvShape {
            format: weights.kv_format,
            layers: weights.layers.len(),
            kv_heads: weights.division.kv_heads.len(),
            head_dim: config.head_dim,
            blocks: kv_blocks,
            block_tokens,
        };
        if shape.block_bytes().checked_mul(kv_blocks).is_none_or(|bytes| bytes > isize::MAX as usize) {
            return invalid("kv_blocks", format!("{kv_blocks} blocks of {} bytes", shape.block_bytes()));
        }
        let positions = config.context_tokens.min(kv_blocks * block_tokens);
        let rope = RopeTable::new(&config.rope, config.head_dim, positions);
        let team = Team::new(threads)
            .map_err(|error| ModelError::Invalid { field: "threads", reason: error.to_string() })?;
        Ok(Self {
            rope: Arc::new(rope),
            cache: KvCache::new(shape, kv_at_once),
            team,
            isa: Isa::best(),
            plan: Plan::new(kv_blocks * block_tokens),
            workspace: Workspace::default(),
            exchange: Exchange::default(),
            weights,
        })
    }

    fn limits(&self) -> Limits {
        Limits {
            vocabulary: self.vocabulary(),
            context_tokens: self.context_tokens(),
            block_tokens: self.block_tokens(),
            blocks: self.blocks(),
        }
    }
}

impl RankForward for Llama {
    fn terms(&self) -> Terms<'_> {
        let LlamaWeights { fingerprint, part, .. } = &*self.weights;
        Terms { fingerprint, part: *part, arithmetic: Arithmetic::Cpu }
    }

    fn config(&self) -> &Config {
        &self.weights.config
    }

    fn weight_bytes(&self) -> usize {
        Self::weight_bytes(self)
    }

    fn block_bytes(&self) -> usize {
        Self::block_bytes(self)
    }

    fn makes_lists(&self) -> bool {
        true
    }

    fn join(&mut self, group: Box<dyn Collective>, ranking: Option<Ranking>) -> Result<(), ModelError> {
        self.exchange = Exchange::with(group, (self.weights.part, ranking), &self.weights.config)?;
        Ok(())
    }

    fn leave(&mut self) {
        self.exchange = Exchange::default();
    }

    fn group(&mut self) -> Option<&mut dyn Collective> {
        self.exchange.group()
    }

    fn prepare(&mut self, rows: &[Row<'_>]) -> Result<(), ModelError> {
        let limits = self.limits();
        self.plan.prepare(rows, &limits, &self.weights.config).map(|_| ())
    }

    fn compute(
        &mut self,
        (rows, wanted): (&[Row<'_>], &[Option<Likeliest>]),
        (logits, lists): (&mut Vec<f32>, &mut Lists),
    ) -> Result<(), ModelError> {
        let vocabulary = self.weights.config.vocabulary;
        lists.clear();
        let whole = self.exchange.begin(rows, wanted);
        logits.resize(whole * vocabulary, 0.0);
        if rows.is_empty() {
            return Ok(());
        }
        match self.weights.part.stages {
            1 => self.step(rows, (logits, 0))?,
            stages => {
                let mut first = 0;
                for rows in micro_batches(rows, stages, MICRO_TOKENS_MIN) {
                    self.plan.lay_out(&rows, self.cache.shape().block_tokens)?;
                    self.step(&rows, (logits, first))?;
                    first += rows.iter().map(Row::wanted).sum::<usize>();
                }
            }
        }
        self.exchange.collect((logits, vocabulary), lists)
    }

    fn keeps(&self, numbers: &[u64]) -> bool {
        self.exchange.keeps(numbers)
    }

    fn hand_over(&mut self, numbers: &[u64], logits: &mut Vec<f32>) -> Result<usize, ModelError> {
        let (vocabulary, is_leader) = (self.weights.config.vocabulary, self.weights.part.rank == 0);
        logits.resize(if is_leader { numbers.len() * vocabulary } else { 0 }, 0.0);
        Ok(self.exchange.collect_kept(numbers, (logits, vocabulary))?)
    }
}

impl Forward for Llama {
    fn vocabulary(&self) -> usize {
        self.weights.config.vocabulary
    }

    fn context_tokens(&self) -> usize {
        self.weights.config.context_tokens
    }

    fn block_tokens(&self) -> usize {
        self.cache.shape().block_tokens
    }

    fn blocks(&self) -> usize {
        self.cache.shape().blocks
    }

    fn forward(&mut self, rows: &[Row<'_>], logits: &mut Vec<f32>) -> Result<(), ModelError> {
        self.prepare(rows)?;
        self.compute((rows, &[]), (logits, &mut Lists::default()))
    }
}
