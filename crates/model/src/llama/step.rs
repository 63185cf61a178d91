//! The arithmetic of one step, layer by layer.

use std::cell::RefCell;
use std::ops::Range;

use uniarm_collective::CollectiveError;

use super::exchange::Exchange;
use super::matrix::Matrix;
use super::plan::Plan;
use super::{Layer, Llama, LlamaWeights};
use crate::adapter::{Conditioned, Group};
use crate::division::{Columns, Division};
use crate::forward::Row;
use crate::kernels::attention::{
    LayerCache, Partials, Queries, attend, attend_segment, heads_together, merge, tokens_together,
};
use crate::kernels::buffer::Buffer;
use crate::kernels::elementwise::{add_rms_norm, gated_silu, rotate};
use crate::kernels::gemm::{Output, Start, multiply};
use crate::kernels::panels::Panels;
use crate::kernels::rows::{Form, Rows};
use crate::kernels::simd::{Isa, LANES};
use crate::kernels::team::Team;
use crate::rope::RopeTable;

/// Shares that each thread gets of a region, on average: more even out a core that others use as well,
/// fewer cost less.
const SHARES_PER_THREAD: usize = 2;

/// Where attention has fewer shares than this for each thread, segments of contexts are shared out: three heads of a long
/// context take two threads as long as four would.
const ATTENTION_SHARES: usize = 16;

/// A share of elementwise work is at least this many floats: less is not worth handing out.
const SHARE_FLOATS: usize = 8192;

/// Activations of a step, (m, …) each; grown to the largest step seen.
#[derive(Default)]
pub(super) struct Workspace {
    /// The residual stream: (m, hidden)
    residual: Buffer,
    /// What the last block adds to it: (m, hidden)
    delta: Buffer,
    /// (m, hidden)
    normed: Buffer,
    /// Input of the next product, packed: (m, at most its inputs)
    packed: Buffer,
    /// (m, queries + 2 × keys)
    qkv: Buffer,
    /// (m, queries)
    attended: Buffer,
    /// Attention's, where segments are shared out.
    partials: Buffer,
    /// (m, 2 × intermediate)
    gate_up: Buffer,
    /// (m, intermediate)
    gated: Buffer,
    runs: Vec<Run>,
    heads: Vec<Heads>,
}

/// Consecutive query heads that attend together, counted from this rank's first.
#[derive(Clone, Copy)]
struct Heads {
    first: usize,
    count: usize,
    /// Counted from this rank's first.
    kv_head: usize,
}

/// Consecutive tokens of one row that attend together.
#[derive(Clone, Copy)]
struct Run {
    /// Index in the caller's rows.
    row: usize,
    /// Index of the first token in the step.
    token: usize,
    tokens: usize,
}

/// One step's view of the model.
struct Step<'a> {
    rows: &'a [Row<'a>],
    plan: &'a Plan,
    weights: &'a LlamaWeights,
    rope: &'a RopeTable,
    team: &'a Team,
    isa: Isa,
    m: usize,
}

thread_local! {
    /// Scores of the queries that a thread attends with.
    static SCORES: RefCell<Buffer> = const { RefCell::new(Buffer::new()) };
}

impl Llama {
    /// Computes the layers of this stage for a prepared plan of at least one token. Of the last stage it fills `logits`,
    /// (wanted, vocabulary), from `first` on; where there are other ranks, they stay as they are until they are collected.
    pub(super) fn step(
        &mut self,
        rows: &[Row<'_>],
        (logits, first): (&mut [f32], usize),
    ) -> Result<(), CollectiveError> {
        let Self { weights, rope, cache, team, isa, plan, workspace, exchange } = self;
        let step = Step { rows, plan, weights, rope, team, isa: *isa, m: plan.tokens.len() };
        let LlamaWeights { part, config, layers, .. } = &**weights;
        team.enter(|| {
            workspace.reserve(step.m, weights);
            step.runs(&mut workspace.runs);
            step.heads(&mut workspace.heads);
            step.begin(workspace, exchange)?;
            for (own, (index, layer)) in part.layers(config).zip(layers).enumerate() {
                step.attention(index, layer, cache.layer(own), (workspace, exchange))?;
                step.mlp(index, layer, (workspace, exchange))?;
            }
            match part.is_last_stage() {
                true => step.head(workspace, exchange, (logits, first)),
                false => step.pass_on(workspace, exchange),
            }
        })
    }
}

impl Workspace {
    fn reserve(&mut self, m: usize, weights: &LlamaWeights) {
        let layer = &weights.layers[0];
        let (hidden, queries, intermediate) =
            (layer.qkv.inputs(), layer.output.inputs(), layer.down.inputs());
        self.residual.reserve(m * hidden);
        self.delta.reserve(m * hidden);
        self.normed.reserve(m * hidden);
        self.packed.reserve(m * hidden.max(queries).max(intermediate));
        self.qkv.reserve(m * layer.qkv.outputs());
        self.attended.reserve(m * queries);
        self.gate_up.reserve(m * 2 * intermediate);
        self.gated.reserve(m * intermediate);
    }
}

// The blocks of a layer.
impl Step<'_> {
    /// residual = embeddings, or what the stage before made of them; delta = 0.
    fn begin(&self, work: &mut Workspace, exchange: &mut Exchange) -> Result<(), CollectiveError> {
        let hidden = self.weights.config.hidden;
        work.delta[..self.m * hidden].fill(0.0);
        if !self.weights.part.is_first_stage() {
            return exchange.take_over(self.m, &mut work.residual[..self.m * hidden]);
        }
        let tokens = self.plan.tokens.iter().map(|token| token.id);
        exchange.embed(tokens, (&mut work.residual[..self.m * hidden], hidden), |token, row| {
            self.weights.embed(token, row);
        })
    }

    /// delta = output projection of the attention over the normalised residual.
    fn attention(
        &self,
        index: usize,
        layer: &Layer,
        cache: LayerCache,
        (work, exchange): (&mut Workspace, &mut Exchange),
    ) -> Result<(), CollectiveError> {
        self.normalise(&layer.attention_norm, &layer.qkv, work);
        let normed = &work.normed[..self.m * layer.qkv.inputs()];
        let qkv = Matrix::new(&mut work.qkv, layer.qkv.outputs()); // (m, queries + 2 × keys)
        self.project(&self.packed(normed, &work.packed, &layer.qkv), &layer.qkv, qkv.output);
        self.finish_keys(index, layer, normed, qkv, cache);

        let queries = layer.output.inputs();
        let attended = exchange.target(Columns::Queries, self.m, (&mut work.attended, queries)); // (m, queries)
        self.attend((&work.runs, &work.heads), (qkv, attended), cache, &mut work.partials);
        exchange.gather(Columns::Queries, self.m, &mut work.attended[..self.m * queries])?;

        let attended = &work.attended[..self.m * queries];
        self.pack(attended, &layer.output, &mut work.packed);
        let hidden = self.weights.config.hidden;
        let delta = exchange.target(Columns::Hidden, self.m, (&mut work.delta, hidden)); // (m, hidden)
        self.project(&self.packed(attended, &work.packed, &layer.output), &layer.output, delta.output);
        self.adapt(index, Group::Output, attended, delta);
        exchange.gather(Columns::Hidden, self.m, &mut work.delta[..self.m * hidden])
    }

    /// delta = down(silu(gate) · up) of the normalised residual.
    fn mlp(
        &self,
        index: usize,
        layer: &Layer,
        (work, exchange): (&mut Workspace, &mut Exchange),
    ) -> Result<(), CollectiveError> {
        self.normalise(&layer.mlp_norm, &layer.gate_up, work);
        let normed = &work.normed[..self.m * layer.gate_up.inputs()];
        let gate_up = Matrix::new(&mut work.gate_up, layer.gate_up.outputs()); // (m, 2 × intermediate)
        let intermediate = layer.down.inputs();
        let gated = exchange.target(Columns::Intermediate, self.m, (&mut work.gated, intermediate)); // (m, intermediate)
        let packed = self.packed(normed, &work.packed, &layer.gate_up);
        self.gate(index, layer, (normed, &packed), gate_up, gated);
        exchange.gather(Columns::Intermediate, self.m, &mut work.gated[..self.m * intermediate])?;

        let gated = &work.gated[..self.m * intermediate];
        self.pack(gated, &layer.down, &mut work.packed);
        let hidden = self.weights.config.hidden;
        let delta = exchange.target(Columns::Hidden, self.m, (&mut work.delta, hidden)); // (m, hidden)
        self.project(&self.packed(gated, &work.packed, &layer.down), &layer.down, delta.output);
        self.adapt(index, Group::Down, gated, delta);
        exchange.gather(Columns::Hidden, self.m, &mut work.delta[..self.m * hidden])
    }

    /// The next stage gets residual + delta.
    fn pass_on(&self, work: &mut Workspace, exchange: &mut Exchange) -> Result<(), CollectiveError> {
        let count = self.m * self.weights.config.hidden;
        let residual = &mut work.residual[..count];
        residual.iter_mut().zip(&work.delta[..count]).for_each(|(sum, delta)| *sum += delta);
        exchange.pass_on(self.m, residual)
    }

    /// Logits of the wanted tokens, in the caller's order.
    fn head(
        &self,
        work: &mut Workspace,
        exchange: &mut Exchange,
        (logits, first): (&mut [f32], usize),
    ) -> Result<(), CollectiveError> {
        let LlamaWeights { config, norm, .. } = self.weights;
        let head = self.weights.head.as_ref().expect("the last stage has the output projection");
        let (wanted, hidden) = (&self.plan.wanted, config.hidden);
        if wanted.is_empty() {
            return Ok(());
        }
        let residual = Matrix::new(&mut work.residual, hidden);
        let (normed, delta) = (Matrix::new(&mut work.normed, hidden), &work.delta);
        self.share_tokens(wanted.len(), hidden, |share| {
            for index in share {
                let token = wanted[index];
                // Safety: wanted tokens are distinct, and shared out.
                let (residual, normed) = unsafe { (residual.row(token), normed.row(index)) };
                let delta = &delta[token * hidden..][..hidden];
                add_rms_norm(self.isa, residual, Some(delta), (norm, config.rms_norm_epsilon), normed);
            }
        });
        let form = Form::of(head.format());
        let normed = Rows::pack(self.isa, form, &work.normed, (wanted.len(), hidden), &mut work.packed);
        let part = exchange.logits(first, logits, config.vocabulary);
        self.project(&normed, head, part.output);
        Ok(())
    }
}

// The parts of a block, each a region that the team shares.
impl Step<'_> {
    /// residual += delta; normed = its norm; packed = normed for the product that is `next`, tile by tile.
    fn normalise(&self, weight: &[f32], next: &Panels, work: &mut Workspace) {
        let hidden = weight.len();
        let weight = (weight, self.weights.config.rms_norm_epsilon);
        let residual = Matrix::new(&mut work.residual, hidden);
        let normed = Matrix::new(&mut work.normed, hidden);
        let form = Form::of(next.format());
        let packed = Matrix::new(&mut work.packed, form.words(hidden));
        let delta = &work.delta;
        self.share_tiles(form, |first, count| {
            // Safety: tiles are shared out.
            unsafe {
                for token in first..first + count {
                    let delta = &delta[token * hidden..][..hidden];
                    add_rms_norm(self.isa, residual.row(token), Some(delta), weight, normed.row(token));
                }
                if !self.is_packed(form) {
                    let source = normed.rows(first, count);
                    form.pack_tile(self.isa, source, count, packed.rows(first, count));
                }
            }
        });
    }

    /// Adapters and bias on queries, keys and values; rotation; keys and values into the cache.
    fn finish_keys(&self, index: usize, layer: &Layer, normed: &[f32], qkv: Matrix, cache: LayerCache) {
        let config = &self.weights.config;
        let head_dim = config.head_dim;
        let Division { heads, kv_heads, .. } = &self.weights.division;
        let (queries, keys) = (heads.len() * head_dim, kv_heads.len() * head_dim);
        let scale = 1.0 / (head_dim as f32).sqrt();
        // With an adapter, a token is worth a share.
        let work = if self.adapts(index, Group::Qkv) { SHARE_FLOATS } else { qkv.width };
        self.share_tokens(self.m, work, |tokens| {
            self.adapt_tokens((index, Group::Qkv), normed, qkv, tokens.clone());
            for token in tokens {
                // Safety: tokens are shared out, and `Plan` gave each its own slot.
                let row = unsafe { qkv.row(token) };
                if let Some(bias) = &layer.qkv_bias {
                    row.iter_mut().zip(bias).for_each(|(x, bias)| *x += bias);
                }
                let token = self.plan.tokens[token];
                let (cosine, sine) = self.rope.at(token.position);
                let (query, row) = row.split_at_mut(queries);
                let (key, value) = row.split_at_mut(keys);
                query.chunks_exact_mut(head_dim).for_each(|head| rotate(head, cosine, sine, scale));
                key.chunks_exact_mut(head_dim).for_each(|head| rotate(head, cosine, sine, 1.0));
                unsafe { cache.write(self.isa, token.slot, key, value) };
            }
        });
    }

    /// Attention of every token over its sequence in the cache.
    fn attend(
        &self,
        (runs, heads): (&[Run], &[Heads]),
        (qkv, attended): (Matrix, Matrix),
        cache: LayerCache,
        partials: &mut Buffer,
    ) {
        let head_dim = self.weights.config.head_dim;
        let queries = |task: usize| {
            let Run { row, token, tokens } = runs[task / heads.len()];
            let Heads { first, count, kv_head } = heads[task % heads.len()];
            let column = first * head_dim;
            Queries {
                position: self.plan.tokens[token].position,
                tokens,
                heads: count,
                kv_head,
                query: qkv.output.row(token).column(column).start(),
                query_stride: qkv.width,
                output: attended.output.row(token).column(column).start(),
                output_stride: attended.width,
                blocks: self.rows[row].blocks,
            }
        };
        let tasks = runs.len() * heads.len();
        let most = |size: &dyn Fn(&Queries<'_>) -> usize| {
            (0..tasks).map(|task| size(&queries(task))).max().unwrap_or(0)
        };
        let threads = self.team.threads();
        let segments = match threads > 1 && tasks < threads * ATTENTION_SHARES {
            true => most(&|queries| queries.segments()),
            false => 1,
        };
        if segments == 1 {
            return self.team.share(tasks, |task| {
                // Safety: every (token, head) is in one task; the cache was written in an earlier region.
                SCORES.with_borrow_mut(|scores| unsafe { attend(self.isa, &queries(task), cache, scores) });
            });
        }
        let size = most(&|queries| Partials::floats(queries, head_dim));
        partials.reserve(tasks * size);
        let partials = Matrix::new(partials, size);
        let partials = |task: usize| Partials { start: partials.output.row(task).start(), head_dim };
        self.team.share(tasks * segments, |share| {
            let (task, segment) = (share / segments, share % segments);
            let queries = queries(task);
            if segment < queries.segments() {
                // Safety: as above, and every segment has results of its own.
                SCORES.with_borrow_mut(|scores| unsafe {
                    attend_segment(self.isa, (&queries, cache), segment, partials(task), scores);
                });
            }
        });
        // Safety: the segments were computed in an earlier region.
        self.team.share(tasks, |task| unsafe { merge(self.isa, &queries(task), partials(task)) });
    }

    /// Cuts this rank's query heads into those that attend together: of one key-value head, and not too many.
    fn heads(&self, heads: &mut Vec<Heads>) {
        let Division { heads: own, kv_heads, .. } = &self.weights.division;
        let (group, together) = (self.group(), heads_together(self.isa, self.group()));
        heads.clear();
        for kv_head in kv_heads.clone() {
            let mut first = own.start.max(kv_head * group);
            let end = own.end.min((kv_head + 1) * group);
            while first < end {
                let count = together.min(end - first);
                let (first_own, kv_head) = (first - own.start, kv_head - kv_heads.start);
                heads.push(Heads { first: first_own, count, kv_head });
                first += count;
            }
        }
    }

    /// Query heads that share a key-value head.
    fn group(&self) -> usize {
        self.weights.config.heads / self.weights.config.kv_heads
    }

    /// Cuts every row into runs of tokens that attend together.
    fn runs(&self, runs: &mut Vec<Run>) {
        let heads = heads_together(self.isa, self.group());
        runs.clear();
        for (row, range) in &self.plan.rows {
            let mut token = range.start;
            while token < range.end {
                let position = self.plan.tokens[token].position;
                let tokens = tokens_together(self.isa, position, range.end - token, heads);
                runs.push(Run { row: *row, token, tokens });
                token += tokens;
            }
        }
    }

    /// gated = silu(gate) · up. A share of panels is gated while it is in the cache of the core that made
    /// it, unless an adapter has to be added first.
    fn gate(
        &self,
        index: usize,
        layer: &Layer,
        (normed, packed): (&[f32], &Rows<'_>),
        gate_up: Matrix,
        gated: Matrix,
    ) {
        let panels = gated.width / LANES;
        if self.adapts(index, Group::GateUp) {
            self.project(packed, &layer.gate_up, gate_up.output);
            self.adapt(index, Group::GateUp, normed, gate_up);
            return self.share_tokens(self.m, gated.width, |tokens| {
                self.gate_columns(gate_up, gated, tokens, 0..gated.width);
            });
        }
        self.share_panels(panels, |gate| {
            let up = gate.start + panels..gate.end + panels;
            let columns = gate.start * LANES..gate.end * LANES;
            // Safety: panels are shared out.
            unsafe {
                multiply(self.isa, packed, &layer.gate_up, gate, gate_up.output, Start::Zero);
                multiply(self.isa, packed, &layer.gate_up, up, gate_up.output, Start::Zero);
            }
            self.gate_columns(gate_up, gated, 0..self.m, columns);
        });
    }

    fn gate_columns(&self, gate_up: Matrix, gated: Matrix, tokens: Range<usize>, columns: Range<usize>) {
        let upper = columns.start + gated.width..columns.end + gated.width;
        for token in tokens {
            // Safety: these tokens or columns are the caller's share, of all three.
            let (gate, up, output) = unsafe {
                let (gate, up) = (
                    gate_up.output.slice(token, columns.clone()),
                    gate_up.output.slice(token, upper.clone()),
                );
                (gate, up, gated.output.slice(token, columns.clone()))
            };
            gated_silu(self.isa, gate, up, output);
        }
    }

    /// output = rows · weightᵀ.
    fn project(&self, rows: &Rows<'_>, panels: &Panels, output: Output) {
        self.share_panels(panels.count(), |range| {
            // Safety: panels are shared out, and with them the columns.
            unsafe { multiply(self.isa, rows, panels, range, output, Start::Zero) };
        });
    }

    /// Packs the rows of all tokens, (m, inputs), for the product that is `next`.
    fn pack(&self, source: &[f32], next: &Panels, packed: &mut Buffer) {
        let form = Form::of(next.format());
        if self.is_packed(form) {
            return;
        }
        let inputs = next.inputs();
        let packed = Matrix::new(packed, form.words(inputs));
        self.share_tiles(form, |first, count| {
            // Safety: tiles are shared out.
            let tile = unsafe { packed.rows(first, count) };
            form.pack_tile(self.isa, &source[first * inputs..][..count * inputs], count, tile);
        });
    }

    /// The packed form of `source` for the product that is `next`.
    fn packed<'b>(&self, source: &'b [f32], packed: &'b [f32], next: &Panels) -> Rows<'b> {
        let form = Form::of(next.format());
        Rows::packed(form, if self.is_packed(form) { source } else { packed }, (self.m, next.inputs()))
    }

    /// A single row of floats is its own packed form.
    fn is_packed(&self, form: Form) -> bool {
        self.m == 1 && form == Form::Floats
    }
}

// Adapters.
impl Step<'_> {
    /// Whether any row's adapter has parts in this group.
    fn adapts(&self, layer: usize, group: Group) -> bool {
        self.plan.spans.iter().any(|span| self.conditioned(span.start).adapter().has(layer, group))
    }

    /// Adds the adapters of all tokens to a projection's output; `input` is (m, inputs).
    fn adapt(&self, layer: usize, group: Group, input: &[f32], output: Matrix) {
        if self.adapts(layer, group) {
            self.share_tokens(self.m, SHARE_FLOATS, |tokens| {
                self.adapt_tokens((layer, group), input, output, tokens)
            });
        }
    }

    fn adapt_tokens(&self, place: (usize, Group), input: &[f32], output: Matrix, tokens: Range<usize>) {
        let inputs = input.len() / self.m;
        for span in &self.plan.spans {
            let (start, end) = (span.start.max(tokens.start), span.end.min(tokens.end));
            if start >= end {
                continue;
            }
            let conditioned = |token: usize| self.conditioned(start + token);
            let input = &input[start * inputs..end * inputs];
            let adapter = self.conditioned(start).adapter();
            // Safety: tokens are the caller's share.
            let output = (&self.weights.division, output.output.row(start));
            unsafe { adapter.add(self.isa, place, input, conditioned, output) };
        }
    }

    fn conditioned(&self, token: usize) -> &Conditioned {
        self.rows[self.plan.tokens[token].row].adapter.expect("spans are of rows with an adapter")
    }
}

// Sharing out.
impl Step<'_> {
    /// Shares out panels in runs of an even number, since tiles of many rows take two.
    fn share_panels(&self, panels: usize, task: impl Fn(Range<usize>) + Sync) {
        let tasks = match self.team.threads() {
            1 => 1,
            threads => (threads * SHARES_PER_THREAD).min(panels.div_ceil(2)),
        };
        let bound = |task: usize| (panels * task / tasks).next_multiple_of(2).min(panels);
        self.team.share(tasks, |index| task(bound(index)..bound(index + 1)));
    }

    /// Shares out tokens, each with `floats` of work.
    fn share_tokens(&self, tokens: usize, floats: usize, task: impl Fn(Range<usize>) + Sync) {
        let tasks = match self.team.threads() {
            1 => 1,
            threads => (threads * SHARES_PER_THREAD).min(tokens * floats / SHARE_FLOATS).clamp(1, tokens),
        };
        self.team.share(tasks, |index| task(tokens * index / tasks..tokens * (index + 1) / tasks));
    }

    /// Shares out the tiles of all tokens: (first token, tokens).
    fn share_tiles(&self, form: Form, task: impl Fn(usize, usize) + Sync) {
        self.team.share(form.tiles(self.isa, self.m).count(), |index| {
            let (first, rows) = form.tiles(self.isa, self.m).nth(index).expect("one of the tiles");
            task(first, rows);
        });
    }
}
