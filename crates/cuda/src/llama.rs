//! A Llama or Qwen2 model on a GPU: what it takes of the device, and how it is loaded.

use uniarm_collective::Collective;
use uniarm_model::{
    Arithmetic, Columns, Config, DeviceRow, Division, Forward, KvFormat, Likeliest, Limits, Lists,
    ModelError, ModelFiles, Part, Plan, RankForward, Ranking, RopeTable, Row, Terms, micro_batches,
};

use crate::adapters::Adapters;
use crate::device::Device;
use crate::graphs::Graphs;
use crate::lister::Lister;
use crate::memory::Memory;
use crate::peers::Peers;
use crate::sheet::Sheet;
use crate::weights::{LlamaWeights, WeightFormat};
use crate::workspace::Workspace;

/// Rows are read 16 bytes at a time, two reads to a lane for the narrowest numbers.
const VECTOR: usize = 16;

/// As in `kernels/attention.cu`.
const HEAD_DIM_MAX: usize = 256;

/// Tokens of a micro-batch, at least. Products, which take three multiply-adds for a weight and an activation, cost more than reading
/// the weights from 50 (A100) to 100 tokens (H100) on, by the rates that their makers give.
const MICRO_TOKENS_MIN: usize = 64;

/// What a model takes of the device.
#[derive(Clone, Copy, Debug)]
pub struct CudaOptions {
    /// Which GPU, counted from 0 among those that the process sees.
    pub device: usize,
    /// Blocks of the cache.
    pub kv_blocks: usize,
    /// Positions per block, a multiple of 16.
    pub block_tokens: usize,
    pub weights: WeightFormat,
    /// Launch steps that come again as graphs; without, each kernel by itself, to compare.
    pub graphs: bool,
}

/// A loaded model with its cache, or one rank's part of both.
pub struct CudaLlama {
    pub(crate) config: Config,
    pub(crate) part: Part,
    /// Whose outputs these are: matrices have those of one rank, and all inputs.
    pub(crate) division: Division,
    pub(crate) weights: LlamaWeights,
    pub(crate) rope: Rope,
    pub(crate) cache: Cache,
    pub(crate) workspace: Workspace,
    /// One for each micro-batch of a step, as many as a step has had.
    pub(crate) sheets: Vec<Sheet>,
    pub(crate) lister: Lister,
    /// None: each kernel is launched by itself.
    pub(crate) graphs: Option<Graphs>,
    adapters: Adapters,
    plan: Plan,
    fingerprint: [u8; 32],
    format: WeightFormat,
    /// None: it has joined no group.
    pub(crate) peers: Option<Peers>,
    /// The last one to go: memory is given back through it.
    pub(crate) device: Device,
}

/// Angles of all positions: (positions, head_dim / 2) each.
pub(crate) struct Rope {
    pub cosine: Memory<f32>,
    pub sine: Memory<f32>,
}

/// Keys and values: (own layers, slots, own kv_heads × head_dim) each.
pub(crate) struct Cache {
    keys: Memory<u8>,
    values: Memory<u8>,
    pub format: KvFormat,
    pub blocks: usize,
    pub block_tokens: usize,
    /// Bytes of a layer's keys; of its values as many.
    layer: usize,
}

impl CudaLlama {
    /// Compiles the kernels, copies the weights, and reserves the cache and the ring of rows behind lists.
    ///
    /// # Errors
    /// [`ModelError::Device`] for a driver, a compiler or a device that is missing, or has no room;
    /// [`ModelError::Unsupported`] for dimensions that the kernels do not take; [`ModelError::Invalid`] for options that
    /// make no model; whatever reading the weights meets.
    pub fn load(files: &ModelFiles, options: &CudaOptions) -> Result<Self, ModelError> {
        Self::load_part(files, options, Part::WHOLE)
    }

    /// One of the parts: a rank of a group whose ranks hand each other memory of their devices
    /// ([`Collective::on_device`]). It computes once it has joined.
    ///
    /// # Errors
    /// As [`CudaLlama::load`]; [`ModelError::Invalid`] for a part that is none.
    pub fn load_part(files: &ModelFiles, options: &CudaOptions, part: Part) -> Result<Self, ModelError> {
        let config = files.config.clone();
        check(files, options)?;
        part.check(&config)?;
        let division = Division::new(&config, part.place(), part.ranks())?;
        // Lists are made where the logits are.
        let listed = if part.is_last_stage() { division.columns(Columns::Vocabulary) } else { 0..0 };
        let device = Device::open(options.device)?;
        let slots = options.kv_blocks * options.block_tokens;
        Ok(Self {
            weights: LlamaWeights::load(&device, files, options.weights, (part, &division))?,
            rope: Rope::load(&device, &config, slots)?,
            cache: Cache::reserve(&device, (&config, part, &division), options)?,
            workspace: Workspace::new(),
            sheets: Vec::new(),
            lister: Lister::reserve(&device, listed, config.vocabulary)?,
            graphs: options.graphs.then(Graphs::default),
            adapters: Adapters::default(),
            plan: Plan::new(slots),
            fingerprint: files.fingerprint,
            format: options.weights,
            peers: None,
            part,
            division,
            config,
            device,
        })
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    /// [`ModelFiles::fingerprint`] of the weights.
    pub fn fingerprint(&self) -> &[u8; 32] {
        &self.fingerprint
    }

    /// The device's name, as its driver has it.
    pub fn device_name(&self) -> &str {
        self.device.name()
    }

    /// Bytes per second that the device's memory gives at most; none where its driver does not say.
    pub fn bandwidth(&self) -> Option<f64> {
        self.device.bandwidth()
    }

    /// Bytes that a step over few rows reads: all matrices once.
    pub fn weight_bytes(&self) -> usize {
        self.weights.bytes()
    }

    /// Bytes of one cache block over all layers that are here.
    pub fn block_bytes(&self) -> usize {
        self.weights.layers.len() * self.cache.block_bytes()
    }

    /// Brings prepared rows to the device, all of them before anything is computed: copying an adapter waits for the stream, which
    /// must not wait for a peer by then. Returns how many micro-batches they are.
    fn fill(&mut self, rows: &[Row<'_>]) -> Result<usize, ModelError> {
        if self.part.stages == 1 {
            self.fill_batch(0, rows, 0)?;
            return Ok(1);
        }
        let batches = micro_batches(rows, self.part.stages, MICRO_TOKENS_MIN);
        let mut first = 0;
        for (index, rows) in batches.iter().enumerate() {
            self.plan.lay_out(rows, self.cache.block_tokens)?;
            self.fill_batch(index, rows, first)?;
            first += self.plan.wanted.len();
        }
        Ok(batches.len())
    }

    /// Brings a laid out micro-batch to the device, whose positions begin with the step's `first` one.
    fn fill_batch(&mut self, index: usize, rows: &[Row<'_>], first: usize) -> Result<(), ModelError> {
        let Self { device, config, part, division, sheets, lister, adapters, plan, peers, .. } = self;
        if sheets.len() == index {
            sheets.push(Sheet::new());
        }
        let fellows = peers.as_ref().filter(|peers| part.is_first_stage() && peers.has_fellows());
        let layers = part.layers(config);
        sheets[index].fill(device, (&layers, division, fellows), (plan, rows), (lister, first), adapters)
    }

    /// Brings the lists of a step to rank 0.
    fn collect(&mut self, lists: &mut Lists) -> Result<(), ModelError> {
        let Self { config, lister, peers, part, .. } = self;
        match peers.as_mut().filter(|peers| peers.has_others()) {
            None => lister.collect((None, *part), std::iter::once(config.vocabulary), lists),
            Some(peers) => {
                let tokens: Vec<usize> = peers.tokens().collect();
                lister.collect((Some(peers.group()), *part), tokens.into_iter(), lists)
            }
        }
    }

    /// A device that fails ends the group: the others wait for it.
    fn watch<T>(&self, result: Result<T, ModelError>) -> Result<T, ModelError> {
        if let (Err(ModelError::Device(reason)), Some(peers)) = (&result, &self.peers) {
            peers.abort(reason);
        }
        result
    }

    fn leads(&self) -> bool {
        self.peers.as_ref().is_none_or(Peers::leads)
    }

    fn limits(&self) -> Limits {
        Limits {
            vocabulary: self.config.vocabulary,
            context_tokens: self.config.context_tokens,
            block_tokens: self.cache.block_tokens,
            blocks: self.cache.blocks,
        }
    }
}

impl Forward for CudaLlama {
    fn vocabulary(&self) -> usize {
        self.config.vocabulary
    }

    fn context_tokens(&self) -> usize {
        self.config.context_tokens
    }

    fn block_tokens(&self) -> usize {
        self.cache.block_tokens
    }

    fn blocks(&self) -> usize {
        self.cache.blocks
    }

    fn forward(&mut self, rows: &[Row<'_>], logits: &mut Vec<f32>) -> Result<(), ModelError> {
        self.forward_listed((rows, &[]), (logits, &mut Lists::default()))
    }

    fn gives_lists(&self) -> bool {
        true
    }

    fn forward_listed(
        &mut self,
        (rows, wanted): (&[Row<'_>], &[Option<Likeliest>]),
        found: (&mut Vec<f32>, &mut Lists),
    ) -> Result<(), ModelError> {
        self.prepare(rows)?;
        self.compute((rows, wanted), found)
    }

    fn listed_rows(&mut self, numbers: &[u64], logits: &mut Vec<f32>) -> Result<usize, ModelError> {
        if !self.keeps(numbers) {
            return Err(ModelError::row_not_kept());
        }
        self.hand_over(numbers, logits)
    }

    fn detach_rows(&mut self, numbers: &[u64]) -> Result<Vec<DeviceRow>, ModelError> {
        if self.part.size > 1 {
            let reason = "each rank has a part of a row on its device".to_owned();
            return Err(ModelError::Invalid { field: "numbers", reason });
        }
        if !self.keeps(numbers) {
            return Err(ModelError::row_not_kept());
        }
        let rows = self.lister.detach(&self.device, numbers)?;
        Ok(rows.into_iter().map(DeviceRow::new).collect())
    }
}

impl RankForward for CudaLlama {
    fn terms(&self) -> Terms<'_> {
        let arithmetic = match self.format {
            WeightFormat::Bf16 => Arithmetic::GpuBf16,
            WeightFormat::F32 => Arithmetic::GpuF32,
        };
        Terms { fingerprint: &self.fingerprint, part: self.part, arithmetic }
    }

    fn config(&self) -> &Config {
        &self.config
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

    /// Lists are made on the device, where a kernel has the ranking that ranks on CPUs are given.
    fn join(&mut self, group: Box<dyn Collective>, _: Option<Ranking>) -> Result<(), ModelError> {
        self.peers = Some(Peers::with(group, self.part, (&self.device, &self.config))?);
        self.lister.restart();
        Ok(())
    }

    fn leave(&mut self) {
        self.peers = None;
    }

    fn group(&mut self) -> Option<&mut dyn Collective> {
        self.peers.as_mut().map(Peers::group)
    }

    fn prepare(&mut self, rows: &[Row<'_>]) -> Result<(), ModelError> {
        self.plan.prepare(rows, &self.limits(), &self.config).map(|_| ())
    }

    fn compute(
        &mut self,
        (rows, wanted): (&[Row<'_>], &[Option<Likeliest>]),
        (logits, lists): (&mut Vec<f32>, &mut Lists),
    ) -> Result<(), ModelError> {
        lists.clear();
        if self.part.size > 1 && self.peers.is_none() {
            let reason = "this part of a model has joined none".to_owned();
            return Err(ModelError::Invalid { field: "group", reason });
        }
        self.lister.begin(rows, wanted);
        let whole = if self.leads() { self.lister.whole() } else { 0 };
        logits.resize(whole * self.config.vocabulary, 0.0);
        if rows.is_empty() {
            return Ok(());
        }
        let mut computed = self.fill(rows).and_then(|batches| self.step(batches, logits));
        if self.lister.lists() > 0 {
            computed = computed.and_then(|()| self.collect(lists));
        }
        self.watch(computed)
    }

    fn keeps(&self, numbers: &[u64]) -> bool {
        self.lister.keeps(numbers)
    }

    fn hand_over(&mut self, numbers: &[u64], logits: &mut Vec<f32>) -> Result<usize, ModelError> {
        let (rows, vocabulary) = (numbers.len(), self.config.vocabulary);
        logits.resize(if self.leads() { rows * vocabulary } else { 0 }, 0.0);
        let Self { device, lister, peers, part, .. } = self;
        let own = if part.is_last_stage() { lister.read_kept(device, numbers) } else { Ok(&[][..]) };
        let handed = own.and_then(|own| match peers.as_mut().filter(|peers| peers.has_others()) {
            None => {
                logits.copy_from_slice(own);
                Ok(0)
            }
            Some(peers) => peers.collect(own, (rows, vocabulary), logits),
        });
        self.watch(handed)
    }
}

impl Rope {
    fn load(device: &Device, config: &Config, slots: usize) -> Result<Self, ModelError> {
        let table = RopeTable::new(&config.rope, config.head_dim, config.context_tokens.min(slots));
        let (cosine, sine) = table.tables();
        let upload = |numbers| Memory::of(device, numbers, "rotary angles");
        Ok(Self { cosine: upload(cosine)?, sine: upload(sine)? })
    }
}

/// Weights of 16 bits have a cache of as many: half the memory, and half of what a long context reads.
fn kv_format(weights: WeightFormat) -> KvFormat {
    match weights {
        WeightFormat::F32 => KvFormat::F32,
        WeightFormat::Bf16 => KvFormat::F16,
    }
}

impl Cache {
    fn reserve(
        device: &Device,
        (config, part, division): (&Config, Part, &Division),
        options: &CudaOptions,
    ) -> Result<Self, ModelError> {
        let CudaOptions { kv_blocks: blocks, block_tokens, .. } = *options;
        let format = kv_format(options.weights);
        let layer = blocks * block_tokens * division.kv_heads.len() * config.head_dim * format.bytes();
        let layers = part.layers(config).len();
        let reserve = || Memory::reserve(device, layers * layer, "half of the cache");
        Ok(Self { keys: reserve()?, values: reserve()?, format, blocks, block_tokens, layer })
    }

    /// Of one block in one layer.
    fn block_bytes(&self) -> usize {
        2 * self.layer / self.blocks
    }

    /// Where keys and values of a layer begin, counted from the first one here.
    pub fn layer(&self, layer: usize) -> (u64, u64) {
        (self.keys.at(layer * self.layer), self.values.at(layer * self.layer))
    }
}

fn check(files: &ModelFiles, options: &CudaOptions) -> Result<(), ModelError> {
    let config = &files.config;
    let dimensions = [
        ("hidden size", config.hidden),
        ("head dimension", config.head_dim),
        ("intermediate size", config.intermediate),
    ];
    let unsupported =
        |feature| Err(ModelError::Unsupported { file: files.weights.path().to_owned(), feature });
    if let Some((what, size)) = dimensions.into_iter().find(|(_, size)| !size.is_multiple_of(VECTOR)) {
        return unsupported(format!("a {what} of {size} (not a multiple of {VECTOR})"));
    }
    if config.head_dim > HEAD_DIM_MAX {
        return unsupported(format!(
            "a head dimension of {} (over {HEAD_DIM_MAX}) on a GPU",
            config.head_dim
        ));
    }
    let CudaOptions { kv_blocks, block_tokens, .. } = *options;
    let invalid = |field, reason| Err(ModelError::Invalid { field, reason });
    if block_tokens == 0 || !block_tokens.is_multiple_of(VECTOR) {
        return invalid("block_tokens", format!("{block_tokens} is not a multiple of {VECTOR}"));
    }
    // Kernels count slots in 31 bits.
    let slots = kv_blocks.checked_mul(block_tokens).filter(|slots| *slots <= i32::MAX as usize);
    if kv_blocks == 0 || slots.is_none() {
        return invalid("kv_blocks", format!("a cache of {kv_blocks} blocks of {block_tokens} positions"));
    }
    Ok(())
}

/// Engines move models between threads.
const _: () = {
    const fn sent<T: Send>() {}
    sent::<CudaLlama>();
};
