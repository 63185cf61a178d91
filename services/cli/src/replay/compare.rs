//! One record against what a cluster computes: answer by answer, and in pieces, where some tokens did without a reward.

use std::time::Duration;

use tonic::Status;
use uniarm_proto::{
    ClusterClient, Event, GenerateRequest, OnRewardLoss, Progress, pb, transcript::finish_reason_name,
};
use uniarm_router::audit::{Answer, Record, ScorerRecord, ServedFrom};

use crate::generate::sentence;

/// A piece of an answer takes no longer: a cluster that is away for so long is not there.
const PIECE_LONGEST: Duration = Duration::from_secs(600);

/// Digits of a digest of weights that a person is shown.
const DIGITS: usize = 12;

/// What a replay says of a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Same,
    /// The first thing that is another.
    Changed(String),
    /// The cluster could not compute it: models are missing, or nobody answers.
    Impossible(String),
}

/// Tokens `from .. to` of an answer: all with their rewards, or all without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    from: usize,
    to: usize,
    is_guided: bool,
}

pub async fn judge(record: &Record, cluster: &ClusterClient) -> Verdict {
    let request = match GenerateRequest::try_from(record.request.clone()) {
        Ok(request) => request,
        Err(error) => return Verdict::Changed(format!("the request is none: {error}")),
    };
    if record.answers.len() != request.sampling.n as usize {
        return Verdict::Changed(format!(
            "{} answers to a request of {}",
            record.answers.len(),
            request.sampling.n
        ));
    }
    for (number, answer) in record.answers.iter().enumerate() {
        let again = match compute(&request, answer, number as u32, cluster).await {
            Ok(again) => again,
            Err(status) => return Verdict::Impossible(sentence(&status)),
        };
        if let Some(difference) = difference(answer, &again) {
            return Verdict::Changed(format!("answer {number}, {difference}"));
        }
    }
    Verdict::Same
}

/// The answer from its first token on, each piece after the recorded tokens before it.
async fn compute(
    request: &GenerateRequest,
    answer: &Answer,
    number: u32,
    cluster: &ClusterClient,
) -> Result<Answer, Status> {
    let mut again = Answer::default();
    for piece in pieces(answer) {
        let is_last = piece.to == answer.ids.len();
        let mut asked = request.clone();
        asked.request_id = String::new();
        (asked.audit, asked.skip, asked.on_reward_loss) = (false, 0, OnRewardLoss::Wait);
        asked.sampling.logprobs.get_or_insert(0);
        if !piece.is_guided {
            asked.guidance.clear();
        }
        // An answer that was cut off had as much to say as was recorded.
        if !is_last || answer.finish_reason.is_none() {
            asked.sampling.max_tokens = piece.to as u32;
        }
        let so_far = |choice: u32| pb::AnswerSoFar {
            choice,
            ids: if choice == number { answer.ids[..piece.from].to_vec() } else { Vec::new() },
            unguided_tokens: 0,
            finished: choice != number,
        };
        let progress = (0..request.sampling.n).map(so_far).filter(|so_far| so_far.finished || piece.from > 0);
        let progress =
            Progress::from_wire(progress.collect()).map_err(|e| Status::internal(e.to_string()))?;
        let mut events = cluster.go_on(asked, progress, Some(PIECE_LONGEST));
        while let Some(event) = events.next().await {
            take(&mut again, event?, piece);
        }
    }
    Ok(again)
}

fn take(again: &mut Answer, event: Event, piece: Piece) {
    match event {
        Event::Tokens(tokens) => {
            if let Some(served) = &tokens.served {
                again.served.push(ServedFrom::new(tokens.position, served));
            }
            let unguided = (0..tokens.ids.len() as u32).filter(|_| !piece.is_guided);
            again.unguided.extend(unguided.map(|index| tokens.position + index));
            again.ids.extend_from_slice(&tokens.ids);
            again.text.push_str(&tokens.text);
            tokens.details.iter().for_each(|detail| again.add(detail));
        }
        Event::Finished(finished) => {
            again.finish_reason = Some(finish_reason_name(&finished).to_owned());
            again.stop.clone_from(&finished.stop);
        }
        Event::Started(_) | Event::Summary(_) => {}
    }
}

fn pieces(answer: &Answer) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    for position in 0..answer.ids.len() {
        let is_guided = !answer.unguided.contains(&(position as u32));
        match pieces.last_mut() {
            Some(piece) if piece.is_guided == is_guided => piece.to += 1,
            _ => pieces.push(Piece { from: position, to: position + 1, is_guided }),
        }
    }
    pieces
}

/// The first thing in which the record is not what was computed.
fn difference(record: &Answer, again: &Answer) -> Option<String> {
    if let Some(other) = other_weights(record, again) {
        return Some(other);
    }
    let differing =
        |from: usize| (from..record.ids.len()).filter(|at| record.ids.get(*at) != again.ids.get(*at));
    if let Some(at) = differing(0).next() {
        let (was, is) = (record.ids[at], again.ids.get(at).map_or("nothing".to_owned(), u32::to_string));
        let (count, all) = (differing(at).count(), record.ids.len());
        return Some(format!(
            "token {at} is {was} in the record, and {is} when it is computed ({count} of {all} differ)"
        ));
    }
    if again.ids.len() > record.ids.len() {
        return Some(format!(
            "ends after {} tokens in the record, and goes on when it is computed",
            record.ids.len()
        ));
    }
    let from = record.details_from;
    let details = [
        ("base log-probability", &record.base_logprobs, &again.base_logprobs),
        ("reward contribution", &record.reward_contributions, &again.reward_contributions),
    ];
    for (what, was, is) in details {
        if let Some(at) = first_difference(was, is.get(from..).unwrap_or_default()) {
            return Some(format!("the {what} of token {} is another one", from + at));
        }
    }
    if let Some(at) =
        first_difference(&record.reward_logprobs, again.reward_logprobs.get(from..).unwrap_or_default())
    {
        return Some(format!("the rewards' log-probabilities of token {} are others", from + at));
    }
    if !again.text.ends_with(&record.text) || (from == 0 && again.text.len() != record.text.len()) {
        return Some("its text is not that of its tokens".to_owned());
    }
    let ends = |answer: &Answer| (answer.finish_reason.clone(), answer.stop.clone());
    if record.finish_reason.is_some() && ends(record) != ends(again) {
        return Some(format!("it ended by {:?}, and by {:?} when it is computed", ends(record), ends(again)));
    }
    None
}

fn first_difference<T: PartialEq>(one: &[T], other: &[T]) -> Option<usize> {
    let differs = |at: &usize| one.get(*at) != other.get(*at);
    (0..one.len().max(other.len())).find(differs)
}

/// Other models compute other tokens: that is no change of a record, and the better thing to hear.
fn other_weights(record: &Answer, again: &Answer) -> Option<String> {
    let scorers = |served: &ServedFrom| {
        let named = std::iter::once(("base", served.base.clone()));
        named.chain(served.rewards.iter().cloned().map(|reward| ("reward", reward))).collect::<Vec<_>>()
    };
    let known = |scorer: &ScorerRecord| !scorer.weights.is_empty();
    let (was, is) = (record.served.last()?, again.served.last()?);
    scorers(was).into_iter().zip(scorers(is)).find_map(|((role, was), (_, is))| {
        (known(&was) && known(&is) && was.weights != is.weights).then(|| {
            let short = |digest: &str| digest.chars().take(DIGITS).collect::<String>();
            format!(
                "{role} model {} in the record, {} here: other weights, other tokens",
                short(&was.weights),
                short(&is.weights)
            )
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(ids: &[u32], unguided: &[u32]) -> Answer {
        Answer {
            ids: ids.to_vec(),
            unguided: unguided.to_vec(),
            base_logprobs: ids.iter().map(|id| Some(-(*id as f32))).collect(),
            reward_contributions: vec![Some(0.0); ids.len()],
            reward_logprobs: vec![vec![]; ids.len()],
            text: "abc".into(),
            finish_reason: Some("length".into()),
            ..Answer::default()
        }
    }

    #[test]
    fn an_answer_falls_into_pieces_with_and_without_rewards() {
        let piece = |from, to, is_guided| Piece { from, to, is_guided };
        assert_eq!(pieces(&answer(&[], &[])), []);
        assert_eq!(pieces(&answer(&[1, 2, 3], &[])), [piece(0, 3, true)]);
        let mixed = pieces(&answer(&[1, 2, 3, 4, 5], &[0, 2, 3]));
        assert_eq!(mixed, [piece(0, 1, false), piece(1, 2, true), piece(2, 4, false), piece(4, 5, true)]);
    }

    #[test]
    fn every_change_is_named_and_the_same_is_the_same() {
        let computed = answer(&[1, 2, 3], &[]);
        assert_eq!(difference(&computed, &computed), None);
        type Change = fn(&mut Answer);
        let changes: [(&str, Change); 7] = [
            ("token 1 is 9", |answer| answer.ids[1] = 9),
            ("goes on when it is computed", |answer| _ = answer.ids.pop()),
            ("base log-probability of token 2", |answer| answer.base_logprobs[2] = Some(-3.000_000_2)),
            ("reward contribution of token 0", |answer| answer.reward_contributions[0] = Some(0.1)),
            ("log-probabilities of token 1", |answer| answer.reward_logprobs[1] = vec![Some(0.0)]),
            ("its text", |answer| answer.text = "abd".into()),
            ("it ended by", |answer| answer.finish_reason = Some("stop".into())),
        ];
        for (words, change) in changes {
            let mut record = computed.clone();
            change(&mut record);
            let found = difference(&record, &computed).unwrap();
            assert!(found.contains(words), "{found}");
        }
    }

    #[test]
    fn an_answer_that_came_from_elsewhere_is_compared_from_there_on() {
        let computed = answer(&[1, 2, 3], &[]);
        let mut record = Answer { details_from: 2, text: "c".into(), ..computed.clone() };
        record.base_logprobs.drain(..2);
        record.reward_contributions.drain(..2);
        record.reward_logprobs.drain(..2);
        assert_eq!(difference(&record, &computed), None);
        record.ids[0] = 7;
        assert!(difference(&record, &computed).unwrap().contains("token 0"));
    }
}
