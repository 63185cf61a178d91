//! What is served, and by whom, as JSON.

use serde_json::{Value, json};
use uniarm_proto::pb;

/// The list of `/v1/models`: what writes, and what steers. `created`: seconds since 1970, of the router; models have no
/// date of their own.
pub(super) fn models(served: &pb::ListModelsResponse, created: u64) -> Value {
    let base = served.base_models.iter().map(|model| base_model(model, created));
    let rewards = served.reward_models.iter().map(|model| reward_model(model, created));
    json!({ "object": "list", "data": base.chain(rewards).collect::<Vec<_>>() })
}

fn base_model(model: &pb::BaseModel, created: u64) -> Value {
    let extension = json!({
        "role": "base",
        "context_tokens": model.context_tokens,
        "vocabulary": model.vocabulary,
        "has_chat_template": model.has_chat_template,
    });
    entry(&model.name, created, &extension)
}

fn reward_model(model: &pb::RewardModel, created: u64) -> Value {
    let objective =
        |objective: &pb::Objective| json!({ "name": objective.name, "description": objective.description });
    let mut extension = json!({
        "role": "reward",
        "objectives": model.objectives.iter().map(objective).collect::<Vec<_>>(),
        "method": model.method,
        "backbone": model.backbone,
        "single_objective": model.single_objective,
    });
    if model.version > 0 {
        extension["version"] = json!(model.version);
    }
    entry(&model.name, created, &extension)
}

fn entry(name: &str, created: u64, extension: &Value) -> Value {
    json!({
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "uniarm",
        "uniarm": extension,
    })
}

/// The pools, without addresses: whoever may ask for answers need not know the network behind.
pub(super) fn status(report: &pb::ReportResponse) -> Value {
    let member = |seen: &pb::MemberReport| {
        let member = seen.member.clone().unwrap_or_default();
        let base = member.base_model.iter().map(|model| model.name.as_str());
        let rewards = member.reward_models.iter().filter(|model| !model.retired);
        let serves: Vec<_> = base.chain(rewards.map(|model| model.name.as_str())).collect();
        json!({
            "role": role(member.role()),
            "id": member.id,
            "serves": serves,
            "capacity": member.capacity,
            "under_way": seen.under_way,
            "left_alone": seen.left_alone,
        })
    };
    let leaving = report.leaving.iter().map(|gone| json!({ "id": gone.id, "under_way": gone.under_way }));
    json!({
        "members": report.members.iter().map(member).collect::<Vec<_>>(),
        "leaving": leaving.collect::<Vec<_>>(),
    })
}

fn role(role: pb::Role) -> &'static str {
    match role {
        pb::Role::Router => "router",
        pb::Role::Base => "base",
        pb::Role::Reward => "reward",
        pb::Role::Unspecified => "unknown",
    }
}
