//! Lists in pages, as OpenAI has them: `limit`, `after` and `order`, and words that a list filters by.

use std::collections::BTreeMap;

use axum::{http::Uri, response::Response};
use serde_json::{Value, json};
use uniarm_proto::Refusal;

use super::{failure::Failure, json_text};

/// What a client asks of a list.
#[derive(Debug)]
pub(super) struct Listing {
    asked: BTreeMap<String, String>,
    limit: usize,
    is_ascending: bool,
}

// === impl Listing ===

impl Listing {
    /// `usual` and `most`: entries of a page.
    ///
    /// # Errors
    /// For a word that no list knows, and a value that is none.
    pub(super) fn of(uri: &Uri, usual: usize, most: usize, filters: &[&str]) -> Result<Self, Failure> {
        let refuse = |field: &str, reason: String| Failure::of_body(Refusal::invalid(field, reason));
        let mut asked = BTreeMap::new();
        for pair in uri.query().unwrap_or("").split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            if !["limit", "after", "order"].contains(&name) && !filters.contains(&name) {
                return Err(refuse(
                    name,
                    "is not supported: leave it out (/openapi.json lists what is)".into(),
                ));
            }
            asked.insert(name.to_owned(), value.to_owned());
        }
        let limit = match asked.get("limit").map(|limit| limit.parse()) {
            None => usual,
            Some(Ok(limit)) if (1..=most).contains(&limit) => limit,
            Some(_) => return Err(refuse("limit", format!("is {:?}, wants 1..={most}", asked["limit"]))),
        };
        let is_ascending = match asked.get("order").map(String::as_str) {
            None | Some("desc") => false,
            Some("asc") => true,
            Some(other) => return Err(refuse("order", format!("is {other:?}, wants asc or desc"))),
        };
        Ok(Self { asked, limit, is_ascending })
    }

    pub(super) fn filter(&self, name: &str) -> Option<&str> {
        self.asked.get(name).map(String::as_str)
    }

    /// `newest_first`: all entries, with their ids.
    ///
    /// # Errors
    /// When `after` is none of them.
    pub(super) fn page(
        &self,
        newest_first: impl Iterator<Item = (String, Value)>,
    ) -> Result<Response, Failure> {
        let mut entries: Vec<_> = newest_first.collect();
        if self.is_ascending {
            entries.reverse();
        }
        let begin = match self.filter("after") {
            None => 0,
            Some(id) => {
                1 + entries.iter().position(|entry| entry.0 == id).ok_or_else(|| {
                    Failure::of_body(Refusal::not_found(
                        "after",
                        format!("is {id:?}, which is not in the list"),
                    ))
                })?
            }
        };
        let page = &entries[begin..entries.len().min(begin + self.limit)];
        let id = |entry: Option<&(String, Value)>| entry.map(|entry| entry.0.clone());
        let list = json!({
            "object": "list",
            "data": page.iter().map(|entry| &entry.1).collect::<Vec<_>>(),
            "first_id": id(page.first()),
            "last_id": id(page.last()),
            "has_more": begin + page.len() < entries.len(),
        });
        Ok(json_text(list.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use axum::body::to_bytes;

    use super::*;

    async fn ids(query: &str) -> Result<(Vec<String>, bool), Failure> {
        let uri = format!("/v1/files?{query}").parse().unwrap();
        let listing = Listing::of(&uri, 2, 3, &["purpose"])?;
        let entries = ["e", "d", "c", "b", "a"].map(|id| (id.to_owned(), json!({ "id": id })));
        let body = to_bytes(listing.page(entries.into_iter())?.into_body(), 1000).await.unwrap();
        let page: Value = serde_json::from_slice(&body).unwrap();
        let data = page["data"].as_array().unwrap();
        let ids = data.iter().map(|entry| entry["id"].as_str().unwrap().to_owned()).collect();
        Ok((ids, page["has_more"] == true))
    }

    #[tokio::test]
    async fn a_list_is_read_page_by_page_in_both_orders() {
        let page = |ids: &[&str], has_more| Ok((ids.iter().map(|id| (*id).to_owned()).collect(), has_more));
        assert_eq!(ids("").await, page(&["e", "d"], true));
        assert_eq!(ids("after=d&limit=3&purpose=batch").await, page(&["c", "b", "a"], false));
        assert_eq!(ids("order=asc&after=d").await, page(&["e"], false));
        for wrong in ["limit=0", "limit=4", "limit=x", "order=up", "after=z", "before=a"] {
            ids(wrong).await.unwrap_err();
        }
    }
}
