//! The traced set of programs: loaded at the start of a trace in exchange for the usual set, and
//! unloaded at its end.
//!
//! ```text
//!  trace_start --> load HOST_TRACED over the same maps --> exchange the program of each hook
//!  trace_stop  --> exchange back --> the traced set is unloaded
//! ```
//!
//! Either every hook runs the programs of one set, or an error names the hook whose exchange failed
//! and every hook keeps its previous set. A new attachment gets its program from the current set.
//! After a crash the next agent loads the usual set into the links that it adopts.

use std::mem::swap;
use std::time::Duration;

use aya::Ebpf;
use aya::maps::{Array, MapData, PerCpuArray, RingBuf};
use common::trace::{Cpu, Filter, Record};
use linux::bpf::link::Interface;
use linux::bpf::record;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep_until};

use super::capacity::load_maps;
use super::filter::Make;
use super::hook::{Attachment, Hook, Program};
use super::link;
use super::sys::{self, Watched};
use super::{Datapath, DatapathError, convert, load_error, lock, map_error, object};

/// Interval between checks of the ring without a wake-up.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// State while the traced set is attached.
pub(super) struct Traced {
    /// The usual set, loaded but not attached.
    usual: Ebpf,
    filter: Array<MapData, Filter>,
    cpus: PerCpuArray<MapData, Cpu>,
}

/// The ring buffer `TRACE`, not read yet.
pub struct TraceRing(RingBuf<MapData>);

impl TraceRing {
    /// Starts the stream of the records. Must be called in a tokio runtime.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Events`].
    pub fn records(self) -> Result<TraceRecords, DatapathError> {
        Ok(TraceRecords {
            ring: sys::watch(self.0).map_err(DatapathError::Events)?,
            due: Instant::now() + CHECK_INTERVAL,
        })
    }
}

/// Stream of the records that the traced programs write.
pub struct TraceRecords {
    ring: AsyncFd<Watched<RingBuf<MapData>>>,
    /// Time of the next check without a wake-up.
    due: Instant,
}

impl TraceRecords {
    /// Waits for the next record. Returns `None` when the caller should check
    /// [`Datapath::trace_left_out`]. Cancel safe.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Events`].
    pub async fn next(&mut self) -> Result<Option<Record>, DatapathError> {
        loop {
            if self.due <= Instant::now() {
                self.due = Instant::now() + CHECK_INTERVAL;
                return Ok(None);
            }
            if let Some(record) = self.ring.get_mut().0.next()
                && let Some(record) = record::read(&record)
            {
                return Ok(Some(record));
            }
            tokio::select! {
                ready = self.ring.readable_mut() => {
                    let mut ready = ready.map_err(DatapathError::Events)?;
                    if let Some(record) = ready.get_inner_mut().0.next() {
                        if let Some(record) = record::read(&record) {
                            return Ok(Some(record));
                        }
                    } else {
                        ready.clear_ready();
                    }
                }
                () = sleep_until(self.due) => {}
            }
        }
    }
}

impl Datapath {
    /// Exchanges the usual programs for the traced ones. Takes as long as the verifier does.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Load`] or [`DatapathError::Attach`], and the usual programs stay attached;
    /// [`DatapathError::TracedAlready`].
    pub fn trace_start(&self, filter: &Filter) -> Result<TraceRing, DatapathError> {
        if lock(&self.inner.tracing).is_some() {
            return Err(DatapathError::TracedAlready);
        }
        let inner = &self.inner;
        let mut other = load_maps(
            &mut lock(&inner.loader),
            &inner.pins,
            &inner.capacities,
            object::HOST_TRACED,
        )?;
        for program in Program::ALL {
            link::classifier(&mut other, program)?
                .load()
                .map_err(|error| load_error(program.name(), &error))?;
        }
        let ring = convert("TRACE", other.take_map("TRACE"))?;
        let cpus = convert("TRACE_CPU", other.take_map("TRACE_CPU"))?;
        let mut map = convert("TRACE_FILTER", other.take_map("TRACE_FILTER"))?;
        set(&mut map, filter)?;
        let mut tracing = lock(&inner.tracing);
        if tracing.is_some() {
            return Err(DatapathError::TracedAlready);
        }
        self.exchange(&mut other)?;
        *tracing = Some(Traced {
            usual: other,
            filter: map,
            cpus,
        });
        Ok(TraceRing(ring))
    }

    /// Replaces the filter of the running trace. Does nothing without a trace.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn trace_filter(&self, filter: &Filter) -> Result<(), DatapathError> {
        match lock(&self.inner.tracing).as_mut() {
            Some(traced) => set(&mut traced.filter, filter),
            None => Ok(()),
        }
    }

    /// Returns the number of decisions that the programs could not report since the start of the
    /// trace.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn trace_left_out(&self) -> Result<u64, DatapathError> {
        let tracing = lock(&self.inner.tracing);
        let Some(traced) = tracing.as_ref() else {
            return Ok(0);
        };
        let cpus = traced
            .cpus
            .get(&0, 0)
            .map_err(|error| map_error("TRACE_CPU", error))?;
        Ok(cpus.iter().map(|cpu| cpu.budget.left_out).sum())
    }

    /// Exchanges the traced programs for the usual ones. Does nothing without a trace.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Attach`]: the traced programs stay attached, and the caller may retry.
    pub fn trace_stop(&self) -> Result<(), DatapathError> {
        let mut tracing = lock(&self.inner.tracing);
        if let Some(traced) = tracing.as_mut() {
            self.exchange(&mut traced.usual)?;
            *tracing = None;
        }
        Ok(())
    }

    /// Whether the traced programs are attached now.
    pub fn is_traced(&self) -> bool {
        lock(&self.inner.tracing).is_some()
    }

    /// Puts the programs of another set at every hook, and makes this set the current one. On
    /// failure every hook keeps its program.
    fn exchange(&self, other: &mut Ebpf) -> Result<(), DatapathError> {
        let _hooks = lock(&self.inner.hooks);
        let attached = self.attachments();
        swap(&mut *lock(&self.inner.programs), other);
        for (done, attachment) in attached.iter().enumerate() {
            let Err(error) = self.exchange_at(attachment) else {
                continue;
            };
            if is_gone(attachment) {
                // The code that learns of the deleted interface detaches its programs.
                tracing::debug!(ifindex = attachment.ifindex, %error, "Nothing to exchange");
                continue;
            }
            swap(&mut *lock(&self.inner.programs), other);
            for attachment in attached.iter().take(done) {
                if let Err(error) = self.exchange_at(attachment)
                    && !is_gone(attachment)
                {
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        "A program of another set stays attached"
                    );
                }
            }
            return Err(error);
        }
        Ok(())
    }

    /// Puts the program of the current set in place of the attached one.
    fn exchange_at(&self, attachment: &Attachment) -> Result<(), DatapathError> {
        match attachment.hook {
            Hook::Filter => {
                let interface = Interface {
                    index: attachment.ifindex,
                    name: &attachment.interface,
                };
                // If another program has deleted the filter's qdisc, this adds the filter again
                // from the current set.
                self.attach_tc(attachment.program, interface, Make::Nothing)
                    .map(drop)
            }
            Hook::Tcx | Hook::XdpNative | Hook::XdpGeneric => self.exchange_in_link(attachment),
        }
    }
}

fn set(map: &mut Array<MapData, Filter>, filter: &Filter) -> Result<(), DatapathError> {
    map.set(0, filter, 0)
        .map_err(|error| map_error("TRACE_FILTER", error))
}

fn is_gone(attachment: &Attachment) -> bool {
    let name = attachment.interface.as_str();
    !nix::net::if_::if_nametoindex(name).is_ok_and(|index| index == attachment.ifindex)
}
