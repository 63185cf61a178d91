//! An answer goes on from any of its tokens: what another worker says next is what the first one would have said.

use tonic::{Code, Request, Status};
use uniarm_proto::{ChoiceTranscript, Event, GenerateRequest, Transcript, pb};

use crate::harness::{Cluster, PROMPTED, ask, machine, request};

/// Stop strings that are held back now and then, characters of several tokens, penalties, details, two answers.
fn rich() -> GenerateRequest {
    let mut rich =
        request("Write a line with many emoji 🌊🐟🙂 and 你好.", &[("positive", 0.7), ("concise", 0.3)]);
    let sampling = &mut rich.sampling;
    sampling.temperature = 1.0;
    sampling.seed = Some(11);
    sampling.max_tokens = 24;
    sampling.n = 2;
    sampling.repetition_penalty = 1.1;
    sampling.presence_penalty = 0.4;
    sampling.stop = vec![" you are the".into(), "!!!".into()];
    sampling.logprobs = Some(1);
    rich
}

fn so_far(choice: u32, ids: &[u32]) -> pb::AnswerSoFar {
    pb::AnswerSoFar { choice, ids: ids.to_vec(), ..pb::AnswerSoFar::default() }
}

/// The events of a request that goes on, put behind what its client has.
async fn go_on(
    cluster: &Cluster,
    resume: Vec<pb::AnswerSoFar>,
    have: &Transcript,
) -> Result<Transcript, Status> {
    let wire = pb::GenerateRequest { resume, ..rich().into() };
    let mut events = cluster.client().await.generate(Request::new(wire)).await?.into_inner();
    let mut transcript = have.clone();
    while let Some(response) = events.message().await? {
        transcript.apply(&response.event.unwrap()).expect("it goes on at the next token");
    }
    Ok(transcript)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_goes_on_from_any_of_its_tokens() {
    let _machine = machine();
    let cluster = Cluster::up(&PROMPTED);
    // What was received before each token: text and details are cut where events are.
    let mut befores = vec![Transcript::default()];
    let mut events =
        cluster.client().await.generate(pb::GenerateRequest::from(rich())).await.unwrap().into_inner();
    while let Some(response) = events.message().await.unwrap() {
        let event = response.event.unwrap();
        let mut next = befores.last().unwrap().clone();
        next.apply(&event).unwrap();
        if matches!(event, Event::Tokens(_)) {
            befores.push(next);
        } else {
            *befores.last_mut().unwrap() = next;
        }
    }
    let whole = befores.pop().unwrap();
    let counted =
        |transcript: &Transcript| transcript.summary.as_ref().unwrap().usage.unwrap().completion_tokens;
    for before in befores.iter().skip(1).step_by(5) {
        let resume = before.choices.iter().enumerate().map(|(choice, answer)| pb::AnswerSoFar {
            finished: answer.finished.is_some(),
            ..so_far(choice as u32, &answer.tokens)
        });
        let again = go_on(&cluster, resume.collect(), before).await.unwrap();
        assert_eq!((&again.choices, counted(&again)), (&whole.choices, counted(&whole)));
    }

    // The last token had arrived, and the word that it was the last had not.
    let ids = whole.choices.iter().map(|choice| choice.tokens.clone());
    let resume: Vec<_> = ids.enumerate().map(|(choice, ids)| so_far(choice as u32, &ids)).collect();
    let mut cut = whole.clone();
    cut.choices.iter_mut().for_each(|choice: &mut ChoiceTranscript| choice.finished = None);
    let again = go_on(&cluster, resume.clone(), &cut).await.unwrap();
    assert_eq!((&again.choices, counted(&again)), (&whole.choices, counted(&whole)));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_have_been_an_answer_is_refused() {
    let _machine = machine();
    let cluster = Cluster::up(&PROMPTED);
    let refused = async |resume| {
        let status = go_on(&cluster, resume, &Transcript::default()).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        status.message().to_owned()
    };
    let too_large = refused(vec![so_far(0, &[1, u32::MAX])]).await;
    assert!(too_large.starts_with("resume.ids"), "{too_large}");
    let too_long = refused(vec![so_far(0, &[1; 25])]).await;
    assert!(too_long.starts_with("resume.ids"), "{too_long}");
    let too_many = refused(vec![so_far(2, &[1])]).await;
    assert!(too_many.starts_with("resume.choice"), "{too_many}");
    // SmolLM2's end of text.
    let past_the_end = refused(vec![so_far(0, &[2, 500])]).await;
    assert!(past_the_end.contains("which ends it"), "{past_the_end}");
    // The cluster goes on.
    ask(&mut cluster.client().await, rich()).await.unwrap();
}
