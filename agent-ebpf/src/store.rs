//! [`ListenerStore`] over the BPF maps `LISTENERS` and `LISTENER_SOURCES`; enforces the limits of
//! each port.

#![allow(unsafe_code, reason = "map values are reached through raw pointers")]

use core::ptr;

use agent_ebpf::instruction;
use aya_ebpf::bindings::BPF_NOEXIST;
use common::counter::Counter;
use common::event::{Change, Kind, ListenerEvent, SourceEvent};
use common::maps::{Listener, ListenerKey, PortUsage, Source, SourceKey};
use common::snoop::{ListenerStore, Refused};
use common::trace::Reason;

use crate::maps::{self, LISTENER_SOURCES, LISTENERS, PORT_USAGE, PORTS};

/// `LISTENERS` and `LISTENER_SOURCES` of one port.
pub(crate) struct MapStore {
    ifindex: u32,
    /// The most recent counter.
    #[cfg(feature = "trace")]
    last: Reason,
}

impl MapStore {
    #[inline(always)]
    pub(crate) fn new(ifindex: u32) -> Self {
        Self {
            ifindex,
            #[cfg(feature = "trace")]
            last: Reason::NONE,
        }
    }

    /// Returns the most recent counter: the reason of a refusal, or the kind of the message.
    #[inline(always)]
    pub(crate) fn last(&self) -> Reason {
        #[cfg(feature = "trace")]
        return self.last;
        #[cfg(not(feature = "trace"))]
        Reason::NONE
    }

    #[inline(always)]
    fn usage(&self) -> Option<*mut PortUsage> {
        PORT_USAGE.get_ptr_mut(self.ifindex)
    }
}

impl ListenerStore for MapStore {
    #[inline(always)]
    fn listener(&self, key: &ListenerKey, value: &mut Listener) -> bool {
        let Some(entry) = LISTENERS.get_ptr(key) else {
            return false;
        };
        // SAFETY: RCU keeps the entry alive until the program ends.
        unsafe { ptr::copy_nonoverlapping(entry, value, 1) }
        true
    }

    #[inline(always)]
    fn add_listener(&mut self, key: &ListenerKey, value: &Listener) -> Result<(), Refused> {
        let (Some(port), Some(usage)) = (PORTS.get_ptr(self.ifindex), self.usage()) else {
            return Err(Refused(Counter::IgnoredPort));
        };
        // SAFETY: both pointers refer to live map values.
        unsafe {
            let used = (*usage).listeners.wrapping_sub((*port).expired_listeners);
            if used >= (*port).max_listeners {
                instruction::add_u64(&raw mut (*usage).refused_listeners, 1);
                return Err(Refused(Counter::RefusedListeners));
            }
            if LISTENERS.insert(key, value, BPF_NOEXIST.into()).is_err() {
                instruction::add_u64(&raw mut (*usage).refused_listeners, 1);
                return Err(Refused(Counter::ListenersFull));
            }
            instruction::add_u32(&raw mut (*usage).listeners, 1);
        }
        Ok(())
    }

    #[inline(always)]
    fn update_listener(&mut self, key: &ListenerKey, value: &Listener) {
        if let Some(entry) = LISTENERS.get_ptr_mut(key) {
            // SAFETY: the pointer refers to a live map value.
            unsafe { ptr::copy_nonoverlapping(value, entry, 1) }
        }
    }

    #[inline(always)]
    fn remove_listener(&mut self, key: &ListenerKey) {
        if LISTENERS.remove(key).is_err() {
            return;
        }
        if let Some(usage) = self.usage() {
            // SAFETY: the pointer refers to a live map value.
            unsafe { instruction::add_u32(&raw mut (*usage).listeners, u32::MAX) }
        }
    }

    #[inline(always)]
    fn source(&self, key: &SourceKey) -> Option<Source> {
        // SAFETY: as in `listener`.
        unsafe { LISTENER_SOURCES.get(key).copied() }
    }

    #[inline(always)]
    fn add_source(&mut self, key: &SourceKey, value: &Source) -> Result<(), Refused> {
        let (Some(port), Some(usage)) = (PORTS.get_ptr(self.ifindex), self.usage()) else {
            return Err(Refused(Counter::IgnoredPort));
        };
        // SAFETY: both pointers refer to live map values.
        unsafe {
            let used = (*usage).sources.wrapping_sub((*port).expired_sources);
            if used >= (*port).max_sources {
                instruction::add_u64(&raw mut (*usage).refused_sources, 1);
                return Err(Refused(Counter::RefusedSources));
            }
            if LISTENER_SOURCES
                .insert(key, value, BPF_NOEXIST.into())
                .is_err()
            {
                instruction::add_u64(&raw mut (*usage).refused_sources, 1);
                return Err(Refused(Counter::SourcesFull));
            }
            instruction::add_u32(&raw mut (*usage).sources, 1);
        }
        Ok(())
    }

    #[inline(always)]
    fn update_source(&mut self, key: &SourceKey, value: &Source) {
        if let Some(entry) = LISTENER_SOURCES.get_ptr_mut(key) {
            // SAFETY: the pointer refers to a live map value.
            unsafe { ptr::copy_nonoverlapping(value, entry, 1) }
        }
    }

    #[inline(always)]
    fn remove_source(&mut self, key: &SourceKey) {
        if LISTENER_SOURCES.remove(key).is_err() {
            return;
        }
        if let Some(usage) = self.usage() {
            // SAFETY: the pointer refers to a live map value.
            unsafe { instruction::add_u32(&raw mut (*usage).sources, u32::MAX) }
        }
    }

    #[inline(always)]
    fn listener_changed(&mut self, change: Change, key: &ListenerKey, value: &Listener) {
        maps::raise(|event: *mut ListenerEvent| {
            // SAFETY: `raise` passes memory for one record.
            unsafe {
                (&raw mut (*event).kind).write(Kind::Listener as u32);
                (&raw mut (*event).change).write(change as u32);
                ptr::copy_nonoverlapping(key, &raw mut (*event).key, 1);
                ptr::copy_nonoverlapping(value, &raw mut (*event).value, 1);
            }
        });
    }

    #[inline(always)]
    fn source_changed(&mut self, change: Change, key: &SourceKey, value: &Source) {
        maps::raise(|event: *mut SourceEvent| {
            // SAFETY: `raise` passes memory for one record.
            unsafe {
                (&raw mut (*event).kind).write(Kind::Source as u32);
                (&raw mut (*event).change).write(change as u32);
                ptr::copy_nonoverlapping(key, &raw mut (*event).key, 1);
                ptr::copy_nonoverlapping(value, &raw mut (*event).value, 1);
            }
        });
    }

    #[inline(always)]
    fn count(&mut self, counter: Counter) {
        #[cfg(feature = "trace")]
        {
            self.last = counter.into();
        }
        maps::count(counter, 1);
    }
}
