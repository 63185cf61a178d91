//! Messages that no peer of ours would send: decoded, and made into what the services work with, or refused.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

use prost::Message as _;
use uniarm_fuzz::fuzz;
use uniarm_proto::{
    ChatMessage, GenerateRequest, GuidanceTerm, Input, Member, Placed, Progress, Role, SessionOp,
    SessionReply, pb,
};

fn request() -> GenerateRequest {
    let chat = vec![ChatMessage { role: "user".into(), content: "Tell me about the sea.".into() }];
    let preference = vec![("harmless".to_owned(), 0.7), ("helpful".to_owned(), 0.3)];
    let guidance = vec![GuidanceTerm { reward: "r".into(), preference, strength: 1.5 }];
    GenerateRequest { guidance, ..GenerateRequest::new(Input::Chat(chat)) }
}

/// The words of a refusal, or none.
fn refused<T, E: std::fmt::Display>(made: Result<T, E>) -> String {
    made.err().map_or_else(String::new, |error| error.to_string())
}

#[test]
fn requests_of_strangers() {
    let mut wire = pb::GenerateRequest::from(request());
    wire.resume = vec![pb::AnswerSoFar { choice: 0, ids: vec![1, 2, 3], ..Default::default() }];
    let tokens = GenerateRequest::new(Input::Tokens(vec![1, 2, 3]));
    let seeds = [wire.encode_to_vec(), pb::GenerateRequest::from(tokens).encode_to_vec()];
    fuzz("generate-request", &seeds, &["harmless", "\n\u{0}"], |bytes| {
        let Ok(mut wire) = pb::GenerateRequest::decode(bytes) else { return "no message".into() };
        let progress = Progress::from_wire(std::mem::take(&mut wire.resume));
        match (progress, GenerateRequest::try_from(wire)) {
            (Ok(progress), Ok(request)) => refused(progress.check(&request.sampling)),
            (progress, request) => refused(progress) + &refused(request),
        }
    });
}

#[test]
fn messages_between_workers_that_are_of_strangers() {
    let run = pb::RunRequest { request: Some(request().into()), ..Default::default() };
    let open = pb::Open {
        reward: "r".into(),
        input: Some(Input::Prompt("p".into()).into()),
        list_length: 32,
        vocabulary: 49_152,
        answer: vec![1, 2],
        ..Default::default()
    };
    let op = |op| pb::SessionOp { session: 1, generation: 1, op: Some(op) };
    let seeds = [
        run.encode_to_vec(),
        op(pb::session_op::Op::Open(open)).encode_to_vec(),
        op(pb::session_op::Op::Advance(pb::Advance { position: 3, ids: vec![1, 2], ..Default::default() }))
            .encode_to_vec(),
        op(pb::session_op::Op::Query(pb::Query { position: 3, ids: vec![1, 2] })).encode_to_vec(),
        pb::Member::from(Member { vocabulary: 7, ..Member::new(Role::Reward) }).encode_to_vec(),
    ];
    fuzz("workers", &seeds, &[], |bytes| {
        let run = pb::RunRequest::decode(bytes).map(|wire| refused(Placed::try_from(wire)));
        let op =
            pb::SessionOp::decode(bytes).map(|wire| refused(wire.op.map(SessionOp::try_from).transpose()));
        let reply = pb::SessionReply::decode(bytes)
            .map(|wire| refused(wire.reply.map(SessionReply::try_from).transpose()));
        let member = pb::Member::decode(bytes).map(|wire| refused(Member::try_from(wire)));
        [run, op, reply, member].map(|found| found.unwrap_or_else(|_| "no message".into())).concat()
    });
}
