//! How the engine comes by whole rows, where lists do not do: from the device's ring to the host, from there into a lane, or by
//! computing them once more.

use std::collections::BTreeMap;

use uniarm_model::DeviceRow;
use uniarm_proto::{Answer, SessionReply};

use super::{Engine, SessionKey};
use crate::{handle::ConnectionId, lane::Lane};

impl Engine {
    /// Answers a question about a row, now or when the row has come again.
    pub(super) fn query(&mut self, key: SessionKey, position: u32, ids: Vec<u32>) {
        if ids.is_empty() && self.send_row(key, position) {
            return;
        }
        if !self.fetch(key, position) {
            return self.sessions.get_mut(&key).expect("it is current").ask_later(position, ids);
        }
        let session = &self.sessions[&key];
        let Some(values) = session.query(position, &ids) else { return }; // late or repeated
        let generation = session.generation;
        self.metrics.queries.inc();
        let answer = Answer { position, ids, values, lane_values: 0 };
        self.reply(key, generation, SessionReply::Answer(answer));
    }

    /// Answers a question for the whole row behind a list over the lane. False: that cannot be, and it goes over the stream.
    fn send_row(&mut self, key: SessionKey, position: u32) -> bool {
        let session = &self.sessions[&key];
        let (generation, length) = (session.generation, session.vocabulary);
        let number = session.answered_list(position).filter(|_| self.lane_room(key.0) > 0);
        let Some(number) = number else { return false };
        let Some(row) = self.executor.detach_rows(&[number]).ok().and_then(|mut rows| rows.pop()) else {
            return false;
        };
        self.metrics.queries.inc();
        let (ids, values, lane_values) = (Vec::new(), Vec::new(), length as u32);
        let answer = Answer { position, ids, values, lane_values };
        self.reply(key, generation, SessionReply::Answer(answer));
        self.put_on_lane(key.0, row, length);
        true
    }

    /// Puts the row behind a position's list in its place, if there is a list. False: the row is gone, and comes again with
    /// the next step.
    pub(super) fn fetch(&mut self, key: SessionKey, position: u32) -> bool {
        let Self { executor, sessions, metrics, .. } = self;
        let session = sessions.get_mut(&key).expect("it is current");
        let Some(number) = session.list_number(position) else { return true };
        match executor.listed_row(number) {
            Ok(Some((row, gathered))) => {
                metrics.logits.on_fetched(gathered);
                session.on_whole_row(position, row);
                true
            }
            // What has failed fails again in the next step, which says so.
            Ok(None) | Err(_) => {
                metrics.logits.on_repeated();
                let from = session.want_row(position);
                executor.repeat(session.sequence, from);
                false
            }
        }
    }

    /// Copies rows that stayed on the device for lanes, of sessions for all of whose rows these have room. Others are fetched, and go
    /// over the stream.
    pub(super) fn detach(&mut self, answered: &[SessionKey]) {
        let mut rooms: BTreeMap<ConnectionId, usize> = BTreeMap::new();
        let (mut places, mut numbers) = (Vec::new(), Vec::new());
        for key in answered {
            let room = rooms.entry(key.0).or_insert_with(|| self.lane_room(key.0));
            let session = &self.sessions[key];
            let count = session.kept_rows().count();
            if count > *room {
                continue;
            }
            *room -= count;
            for (position, number) in session.kept_rows() {
                places.push((*key, position));
                numbers.push(number);
            }
        }
        if numbers.is_empty() {
            return;
        }
        match self.executor.detach_rows(&numbers) {
            Ok(rows) => {
                for ((key, position), row) in places.into_iter().zip(rows) {
                    self.sessions.get_mut(&key).expect("it was just looked at").on_detached(position, row);
                }
            }
            Err(error) => tracing::debug!(%error, "rows go over the stream"),
        }
    }

    /// Rows that a base worker's lane has room for.
    fn lane_room(&self, connection: ConnectionId) -> usize {
        let lane = self.connections.get(&connection).and_then(|peer| peer.lane.as_ref());
        lane.map_or(0, Lane::room)
    }

    /// Behind the rows that were announced before.
    pub(super) fn put_on_lane(&mut self, connection: ConnectionId, row: DeviceRow, length: usize) {
        let lane = self.connections.get(&connection).and_then(|peer| peer.lane.as_ref());
        let lane = lane.expect("a lane had room for the row, and closes between turns alone");
        lane.send(row, length);
        self.metrics.lane_rows.inc();
    }
}
