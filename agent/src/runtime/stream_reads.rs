//! Reads of the stream maps, away from the event loop.
//!
//! A read covers whole maps. Requests that arrive during a read are answered by the next read.

use std::collections::{BTreeMap, VecDeque};
use std::mem;

use common::maps::ManagedKey;

use crate::datapath::{Datapath, DatapathError};
use crate::job::Job;
use crate::proto::{DatapathEvent, Stream};

type Request = (u64, Vec<ManagedKey>);

/// Pending requests, and the running read.
pub(super) struct StreamReads {
    datapath: Datapath,
    waiting: Vec<Request>,
    job: Job<Result<VecDeque<DatapathEvent>, DatapathError>>,
    answers: VecDeque<DatapathEvent>,
}

impl StreamReads {
    pub(super) fn new(datapath: &Datapath) -> Self {
        Self {
            datapath: datapath.clone(),
            waiting: Vec::new(),
            job: Job::default(),
            answers: VecDeque::new(),
        }
    }

    /// Requests the flows of some addresses. The answer repeats the token.
    pub(super) fn ask(&mut self, token: u64, keys: Vec<ManagedKey>) {
        self.waiting.push((token, keys));
    }

    /// Waits for the next answer. Cancel safe: no answer is lost.
    pub(super) async fn next(&mut self) -> Result<DatapathEvent, DatapathError> {
        loop {
            if let Some(answer) = self.answers.pop_front() {
                return Ok(answer);
            }
            if self.job.is_idle() && !self.waiting.is_empty() {
                let datapath = self.datapath.clone();
                let requests = mem::take(&mut self.waiting);
                self.job.start(move || read(&datapath, requests));
            }
            self.answers = self
                .job
                .next()
                .await
                .map_err(|_| DatapathError::Shutdown)??;
        }
    }
}

fn read(
    datapath: &Datapath,
    requests: Vec<Request>,
) -> Result<VecDeque<DatapathEvent>, DatapathError> {
    let mut by_address: BTreeMap<ManagedKey, Vec<_>> = BTreeMap::new();
    for (key, stream) in datapath.all_streams()? {
        let flows = by_address.entry(key.managed()).or_default();
        flows.push((key, stream));
    }
    let flows = |keys: Vec<ManagedKey>| -> Vec<(_, Stream)> {
        let known = keys.iter().filter_map(|key| by_address.get(key));
        known.flatten().copied().collect()
    };
    let answer = |(token, keys)| DatapathEvent::Streams {
        token,
        streams: flows(keys),
    };
    Ok(requests.into_iter().map(answer).collect())
}
