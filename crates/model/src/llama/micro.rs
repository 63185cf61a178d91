//! Micro-batches: a step that passes through several stages is cut, so that all stages compute at the same time.
//!
//! With S stages and b micro-batches a step takes (S + b − 1)/b times as long as its slowest stage alone. But every micro-batch
//! reads the weights again: few rows, which take as long as reading them does, are not cut, and pass the stages one after the
//! other. All ranks cut a step in the same way; no logit depends on it, as none depends on how a prompt is cut into chunks.

use crate::forward::Row;

/// Micro-batches for each stage, at most: with so many, stages wait for each other a fifth of the time.
const PER_STAGE_MAX: usize = 4;

/// Cuts rows, in their order, into batches of nearly equally many tokens, and of `tokens_min` at least: as many as it takes until
/// arithmetic costs more than reading the weights.
pub fn micro_batches<'a>(rows: &[Row<'a>], stages: usize, tokens_min: usize) -> Vec<Vec<Row<'a>>> {
    let all: usize = rows.iter().map(|row| row.tokens.len()).sum();
    let count = (all / tokens_min).clamp(1, PER_STAGE_MAX * stages);
    let mut batches: Vec<Vec<Row<'a>>> = Vec::with_capacity(count);
    let mut rows = rows.iter().copied();
    let mut open = rows.next();
    let mut done = 0;
    for number in 1..=count {
        let end = all * number / count;
        let mut batch = Vec::new();
        while let Some(row) = open.take_if(|_| done < end) {
            let (now, later) = cut(row, end - done);
            done += now.tokens.len();
            batch.push(now);
            open = later.or_else(|| rows.next());
        }
        batches.push(batch);
    }
    batches
}

/// The first `tokens` tokens of a row, and what is left of it.
fn cut(row: Row<'_>, tokens: usize) -> (Row<'_>, Option<Row<'_>>) {
    let Some((now, later)) = row.tokens.split_at_checked(tokens).filter(|(_, later)| !later.is_empty())
    else {
        return (row, None);
    };
    let rest = Row {
        tokens: later,
        start: row.start + now.len(),
        logits_from: row.logits_from.saturating_sub(now.len()),
        ..row
    };
    (Row { tokens: now, logits_from: row.logits_from.min(now.len()), ..row }, Some(rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKENS_MIN: usize = 32;

    fn row(tokens: &[u32], start: usize, logits_from: usize) -> Row<'_> {
        Row { tokens, start, blocks: &[0], logits_from, adapter: None }
    }

    #[test]
    fn few_tokens_stay_together() {
        let tokens: Vec<u32> = (0..63).collect();
        let rows: Vec<Row<'_>> = tokens.chunks(1).map(|token| row(token, 5, 0)).collect();
        let batches = micro_batches(&rows, 4, TOKENS_MIN);
        assert_eq!(batches.len(), 1);
        assert_eq!(batches[0].len(), 63);
    }

    #[test]
    fn batches_have_every_token_once_in_order_with_the_logits_that_were_wanted() {
        let tokens: Vec<u32> = (0..1000).collect();
        for (stages, expected) in [(2, 8), (3, 12), (64, 35)] {
            // A decode row, a chunk without logits, one with those of its last two, and one with all.
            let rows = [
                row(&tokens[..1], 30, 0),
                row(&tokens[1..501], 7, 500),
                row(&tokens[501..900], 0, 397),
                row(&tokens[..230], 90, 0),
            ];
            let batches = micro_batches(&rows, stages, TOKENS_MIN);
            assert_eq!(batches.len(), expected);
            let sizes = batches.iter().map(|rows| rows.iter().map(|row| row.tokens.len()).sum::<usize>());
            assert!(sizes.clone().max() <= sizes.min().map(|least| least + 1));

            let wanted = |rows: &[Row<'_>]| -> Vec<(u32, usize)> {
                let of = |row: &Row<'_>| {
                    let positions = row.start..row.start + row.tokens.len();
                    let tokens = row.tokens.iter().copied().zip(positions);
                    tokens.skip(row.logits_from).collect::<Vec<_>>()
                };
                rows.iter().flat_map(of).collect()
            };
            let cut: Vec<Row<'_>> = batches.concat();
            assert!(cut.iter().all(|row| !row.tokens.is_empty()));
            assert_eq!(wanted(&cut), wanted(&rows));
            let tokens =
                |rows: &[Row<'_>]| -> Vec<u32> { rows.iter().flat_map(|row| row.tokens).copied().collect() };
            assert_eq!(tokens(&cut), tokens(&rows));
        }
    }
}
