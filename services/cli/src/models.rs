//! `uniarm models`: what a cluster serves.

use serde_json::json;
use uniarm_proto::pb;

use crate::{args::ModelsArgs, client};

pub async fn run(args: ModelsArgs) -> anyhow::Result<()> {
    let cluster = client::dial(&args.endpoint).await?;
    let served = cluster.list_models().await.map_err(|status| anyhow::anyhow!("{}", status.message()))?;
    if args.json {
        println!("{}", as_json(&served));
    } else {
        print_table(&served);
    }
    Ok(())
}

fn as_json(served: &pb::ListModelsResponse) -> serde_json::Value {
    let base = |model: &pb::BaseModel| {
        json!({
            "name": model.name,
            "context_tokens": model.context_tokens,
            "vocabulary": model.vocabulary,
            "has_chat_template": model.has_chat_template,
        })
    };
    let reward = |model: &pb::RewardModel| {
        let objectives: Vec<_> = model
            .objectives
            .iter()
            .map(|o| json!({ "name": o.name, "description": o.description }))
            .collect();
        json!({
            "name": model.name,
            "version": (model.version > 0).then_some(model.version),
            "objectives": objectives,
            "backbone": model.backbone,
            "method": model.method,
        })
    };
    json!({
        "base_models": served.base_models.iter().map(base).collect::<Vec<_>>(),
        "reward_models": served.reward_models.iter().map(reward).collect::<Vec<_>>(),
    })
}

fn print_table(served: &pb::ListModelsResponse) {
    println!("BASE MODELS");
    for model in &served.base_models {
        println!(
            "  {}  (context {} tokens, vocabulary {})",
            model.name, model.context_tokens, model.vocabulary
        );
    }
    println!("REWARD MODELS");
    for model in &served.reward_models {
        let version = if model.version > 0 { format!("version {}, ", model.version) } else { String::new() };
        println!("  {}  ({version}{} on {})", model.name, model.method, model.backbone);
        for objective in &model.objectives {
            println!("      {}: {}", objective.name, objective.description);
        }
    }
}
