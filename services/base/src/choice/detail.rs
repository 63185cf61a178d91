//! What the clients that ask for details hear of a token.

use uniarm_decode::{guidance::top_list, log_sum_exp};
use uniarm_model::Tokenizer;
use uniarm_proto::pb;

use crate::term::TermRow;

/// The base model's row for one token; none, where its logits are a list.
pub(super) struct WholeRow<'a> {
    pub own: &'a [f32],
    /// Times its strength.
    pub weighed: &'a [f32],
}

/// What each reward thinks of a token.
pub(super) fn reward_logprobs(token: u32, rows: &[(f32, &TermRow)]) -> Vec<f32> {
    rows.iter().map(|(_, row)| row.log_probability(token).unwrap_or(f32::NEG_INFINITY)).collect()
}

/// What the reward changed, for one token. Alternatives need whole rows, which such requests ask for.
pub(super) fn detail(
    token: u32,
    alternatives: usize,
    base: &WholeRow<'_>,
    rows: &[(f32, &TermRow)],
    tokenizer: &Tokenizer,
) -> pb::TokenDetail {
    let base_normalizer = log_sum_exp(base.own);
    let contribution = |id: u32| {
        let of = |(strength, row): &(f32, &TermRow)| strength * row.log_probability(id).unwrap_or(0.0);
        rows.iter().map(of).sum::<f32>()
    };
    let mut detail = pb::TokenDetail {
        base_logprob: base.own[token as usize] - base_normalizer,
        reward_contribution: contribution(token),
        ..pb::TokenDetail::default()
    };
    if alternatives == 0 {
        return detail;
    }
    let mut guided = base.weighed.to_vec(); // (vocabulary)
    for (strength, row) in rows {
        for (id, sum) in guided.iter_mut().enumerate() {
            *sum += strength * row.logit(id as u32).unwrap_or(f32::NEG_INFINITY);
        }
    }
    let guided_normalizer = log_sum_exp(&guided);
    let mut ids = top_list(&guided, alternatives).ids().to_vec();
    if !ids.contains(&token) {
        ids.pop();
        ids.push(token);
    }
    detail.alternatives = ids
        .into_iter()
        .map(|id| pb::Alternative {
            id,
            text: String::from_utf8_lossy(tokenizer.token_bytes(id)).into_owned(),
            base_logprob: base.own[id as usize] - base_normalizer,
            reward_contribution: contribution(id),
            guided_logprob: guided[id as usize] - guided_normalizer,
        })
        .collect();
    detail
}
