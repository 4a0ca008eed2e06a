//! Calls to libvirt that the `virt` crate does not wrap: event callbacks, job statistics,
//! cancelling, migration parameters. This file contains all foreign calls of the agent to libvirt.

#![allow(
    unsafe_code,
    reason = "libvirt's C interface; every block says why it is sound"
)]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;
use std::time::Duration;
use std::{mem, ptr, thread};

use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::Error;
use virt_sys as sys;

use crate::proto::{DomainUuid, JobStats};

/// An event, as libvirt passes it to a callback.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum RawEvent {
    /// `VIR_DOMAIN_EVENT_ID_LIFECYCLE`.
    Lifecycle {
        uuid: DomainUuid,
        /// `VIR_DOMAIN_EVENT_*`.
        event: u32,
        /// `VIR_DOMAIN_EVENT_*_*`, by event.
        detail: u32,
    },
    /// `VIR_DOMAIN_EVENT_ID_DEVICE_ADDED` or `_REMOVED`.
    DevicesChanged { uuid: DomainUuid },
    /// `VIR_DOMAIN_EVENT_ID_MIGRATION_ITERATION`: a new pass over the domain's memory begins.
    MigrationIteration { uuid: DomainUuid, iteration: i32 },
    /// `VIR_DOMAIN_EVENT_ID_JOB_COMPLETED`.
    JobCompleted { uuid: DomainUuid, stats: JobStats },
    /// The connection is lost; `VIR_CONNECT_CLOSE_REASON_*`.
    Closed { reason: u32 },
}

/// Receives events on the event loop's thread. A handler must neither call libvirt nor block.
pub(super) type Handler = Box<dyn Fn(RawEvent) + Send + Sync>;

/// Starts libvirt's event loop on a thread of its own, once per process. The loop has to run before
/// a connection is opened.
///
/// # Errors
///
/// libvirt's error, or the system's if it refuses the thread.
pub(super) fn start_event_loop() -> Result<(), String> {
    static STARTED: OnceLock<Result<(), String>> = OnceLock::new();
    STARTED
        .get_or_init(|| {
            // Errors are returned, so libvirt need not print them to stderr too.
            virt::error::clear_error_callback();
            virt::event::event_register_default_impl().map_err(|error| error.to_string())?;
            thread::Builder::new()
                .name("libvirt-events".to_owned())
                .spawn(|| {
                    loop {
                        if let Err(error) = virt::event::event_run_default_impl() {
                            tracing::warn!(%error, "libvirt's event loop failed once");
                            thread::sleep(Duration::from_millis(100));
                        }
                    }
                })
                .map(drop)
                .map_err(|error| error.to_string())
        })
        .clone()
}

/// Callbacks registered on a connection. Dropping the value deregisters them.
pub(super) struct Subscription {
    connection: Connect,
    callbacks: Vec<c_int>,
    close_callback: bool,
}

/// Registers `handler` for the events of a connection.
///
/// # Errors
///
/// libvirt's error. A driver without an event (such as `test`) accepts the callback and never calls
/// it.
pub(super) fn subscribe(
    connection: &Connect,
    handler: impl Fn() -> Handler,
) -> Result<Subscription, Error> {
    let mut subscription = Subscription {
        connection: connection.clone(),
        callbacks: Vec::new(),
        close_callback: false,
    };
    type Generic = sys::virConnectDomainEventGenericCallback;
    type Lifecycle = sys::virConnectDomainEventCallback;
    type Device = sys::virConnectDomainEventDeviceAddedCallback;
    type Iteration = sys::virConnectDomainEventMigrationIterationCallback;
    type JobCompleted = sys::virConnectDomainEventJobCompletedCallback;
    // SAFETY: libvirt calls a callback with the type that belongs to its event's number, which is
    // the type before this cast; all are nullable function pointers of the same size. The callback
    // for a device's removal has the parameters of the callback for its addition.
    let callbacks = unsafe {
        [
            (
                sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE,
                mem::transmute::<Lifecycle, Generic>(Some(on_lifecycle)),
            ),
            (
                sys::VIR_DOMAIN_EVENT_ID_DEVICE_ADDED,
                mem::transmute::<Device, Generic>(Some(on_device)),
            ),
            (
                sys::VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED,
                mem::transmute::<Device, Generic>(Some(on_device)),
            ),
            (
                sys::VIR_DOMAIN_EVENT_ID_MIGRATION_ITERATION,
                mem::transmute::<Iteration, Generic>(Some(on_iteration)),
            ),
            (
                sys::VIR_DOMAIN_EVENT_ID_JOB_COMPLETED,
                mem::transmute::<JobCompleted, Generic>(Some(on_job_completed)),
            ),
        ]
    };
    for (event, callback) in callbacks {
        let opaque = into_opaque(handler());
        // SAFETY: the connection is open while it is borrowed. From here on libvirt owns `opaque`
        // and frees it with `free_handler` after the last call of the callback.
        let id = unsafe {
            sys::virConnectDomainEventRegisterAny(
                connection.as_ptr(),
                ptr::null_mut(),
                event as c_int,
                callback,
                opaque,
                Some(free_handler),
            )
        };
        if id < 0 {
            // SAFETY: libvirt did not take ownership.
            unsafe { free_handler(opaque) };
            return Err(Error::last_error());
        }
        subscription.callbacks.push(id);
    }
    let opaque = into_opaque(handler());
    // SAFETY: as above.
    let result = unsafe {
        sys::virConnectRegisterCloseCallback(
            connection.as_ptr(),
            Some(on_close),
            opaque,
            Some(free_handler),
        )
    };
    if result < 0 {
        // SAFETY: libvirt did not take ownership.
        unsafe { free_handler(opaque) };
        return Err(Error::last_error());
    }
    subscription.close_callback = true;
    Ok(subscription)
}

impl Drop for Subscription {
    fn drop(&mut self) {
        for &id in &self.callbacks {
            // SAFETY: the connection is open while `self` holds it; the connection returned this
            // number. libvirt deregisters the callback of a lost connection too.
            unsafe { sys::virConnectDomainEventDeregisterAny(self.connection.as_ptr(), id) };
        }
        if self.close_callback {
            // SAFETY: as above; the function is the registered one.
            unsafe {
                sys::virConnectUnregisterCloseCallback(self.connection.as_ptr(), Some(on_close))
            };
        }
    }
}

fn into_opaque(handler: Handler) -> *mut c_void {
    // A box in a box: the pointer of a trait object has two words, `opaque` has one.
    Box::into_raw(Box::new(handler)).cast()
}

unsafe extern "C" fn free_handler(opaque: *mut c_void) {
    // SAFETY: the pointer comes from `into_opaque`, and libvirt frees it once.
    let handler = unsafe { Box::from_raw(opaque.cast::<Handler>()) };
    let _ = catch_unwind(AssertUnwindSafe(|| drop(handler)));
}

/// Calls the handler and stops a panic, which must not cross C frames.
///
/// # Safety
///
/// `opaque` comes from [`into_opaque`] and has not been freed.
unsafe fn call(opaque: *mut c_void, event: Option<RawEvent>) {
    let Some(event) = event else { return };
    // SAFETY: the caller's promise; handlers are `Sync`, and nothing borrows them mutably.
    let handler = unsafe { &*opaque.cast::<Handler>() };
    if catch_unwind(AssertUnwindSafe(|| handler(event))).is_err() {
        tracing::error!("A handler of libvirt events panicked; the event is lost");
    }
}

unsafe extern "C" fn on_lifecycle(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    event: c_int,
    detail: c_int,
    opaque: *mut c_void,
) -> c_int {
    // SAFETY: libvirt passes a live domain and the registered `opaque`.
    unsafe {
        let event = uuid(domain).map(|uuid| RawEvent::Lifecycle {
            uuid,
            event: event.cast_unsigned(),
            detail: detail.cast_unsigned(),
        });
        call(opaque, event);
    }
    0
}

unsafe extern "C" fn on_device(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    _alias: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt passes a live domain and the registered `opaque`.
    unsafe {
        call(
            opaque,
            uuid(domain).map(|uuid| RawEvent::DevicesChanged { uuid }),
        );
    };
}

unsafe extern "C" fn on_iteration(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    iteration: c_int,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt passes a live domain and the registered `opaque`.
    unsafe {
        let event = uuid(domain).map(|uuid| RawEvent::MigrationIteration { uuid, iteration });
        call(opaque, event);
    }
}

unsafe extern "C" fn on_job_completed(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    params: sys::virTypedParameterPtr,
    nparams: c_int,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt passes a live domain, the registered `opaque`, and an array that lives until
    // the callback returns.
    unsafe {
        let stats = stats(params, nparams);
        call(
            opaque,
            uuid(domain).map(|uuid| RawEvent::JobCompleted { uuid, stats }),
        );
    }
}

unsafe extern "C" fn on_close(_: sys::virConnectPtr, reason: c_int, opaque: *mut c_void) {
    let reason = reason.cast_unsigned();
    // SAFETY: libvirt passes the registered `opaque`.
    unsafe { call(opaque, Some(RawEvent::Closed { reason })) };
}

/// # Safety
///
/// `domain` is a live domain.
unsafe fn uuid(domain: sys::virDomainPtr) -> Option<DomainUuid> {
    let mut uuid = [0; 16];
    // SAFETY: the array has VIR_UUID_BUFLEN (16) bytes.
    let result = unsafe { sys::virDomainGetUUID(domain, uuid.as_mut_ptr()) };
    (result == 0).then_some(DomainUuid(uuid))
}

/// # Safety
///
/// `params` is an array of `nparams`.
unsafe fn stats(params: sys::virTypedParameterPtr, nparams: c_int) -> JobStats {
    let read = |name: &CStr| {
        let mut value = 0;
        // SAFETY: the caller's promise; the name ends in a zero; `value` has the requested type.
        let found =
            unsafe { sys::virTypedParamsGetULLong(params, nparams, name.as_ptr(), &mut value) };
        (found == 1).then_some(value)
    };
    JobStats {
        processed_bytes: read(sys::VIR_DOMAIN_JOB_MEMORY_PROCESSED).unwrap_or(0),
        total_bytes: read(sys::VIR_DOMAIN_JOB_MEMORY_TOTAL).unwrap_or(0),
        iteration: read(sys::VIR_DOMAIN_JOB_MEMORY_ITERATION).unwrap_or(0),
        downtime: read(sys::VIR_DOMAIN_JOB_DOWNTIME).map(Duration::from_millis),
    }
}

/// Returns the statistics of the job that runs on a domain, if one does.
///
/// # Errors
///
/// libvirt's error. Only the source knows the statistics of a migration; libvirt refuses the call
/// at the destination.
pub(super) fn job_stats(domain: &Domain) -> Result<Option<JobStats>, Error> {
    Ok(job(domain)?.map(|job| job.stats))
}

/// Returns true if libvirt is migrating the domain to another host.
///
/// # Errors
///
/// As for [`job_stats`].
pub(super) fn is_migrating(domain: &Domain) -> Result<bool, Error> {
    Ok(job(domain)?.is_some_and(|job| job.is_departure))
}

struct Job {
    stats: JobStats,
    /// True: the job is a migration to another host.
    is_departure: bool,
}

fn job(domain: &Domain) -> Result<Option<Job>, Error> {
    let (mut kind, mut params, mut nparams) = (0, ptr::null_mut(), 0);
    // SAFETY: the domain is live while it is borrowed; libvirt allocates the array.
    let result = unsafe {
        sys::virDomainGetJobStats(domain.as_ptr(), &mut kind, &mut params, &mut nparams, 0)
    };
    if result < 0 {
        return Err(Error::last_error());
    }
    let mut operation = 0;
    // SAFETY: the array and its length come from libvirt, and the array is freed once; the name
    // ends in a zero, and `operation` has the requested type.
    let stats = unsafe {
        let stats = stats(params, nparams);
        sys::virTypedParamsGetInt(
            params,
            nparams,
            sys::VIR_DOMAIN_JOB_OPERATION.as_ptr(),
            &mut operation,
        );
        sys::virTypedParamsFree(params, nparams);
        stats
    };
    // While a job runs, this field holds QEMU's estimate of the downtime.
    let stats = JobStats {
        downtime: None,
        ..stats
    };
    let job = Job {
        stats,
        is_departure: operation.cast_unsigned() == sys::VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT,
    };
    Ok((kind.cast_unsigned() != sys::VIR_DOMAIN_JOB_NONE).then_some(job))
}

/// Cancels the job that runs on a domain.
///
/// # Errors
///
/// libvirt's error, also if no job runs or the job can no longer be cancelled.
pub(super) fn abort_job(domain: &Domain) -> Result<(), Error> {
    // SAFETY: the domain is live while it is borrowed.
    match unsafe { sys::virDomainAbortJob(domain.as_ptr()) } {
        0 => Ok(()),
        _ => Err(Error::last_error()),
    }
}

/// Value of a migration parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Value {
    /// `VIR_TYPED_PARAM_STRING`.
    Text(CString),
    /// `VIR_TYPED_PARAM_ULLONG`.
    Long(u64),
    /// `VIR_TYPED_PARAM_INT`.
    Int(i32),
}

/// Calls `virDomainMigrateToURI3`. Returns when the migration has ended.
///
/// # Errors
///
/// libvirt's error. The domain then still runs at the source, unless the connection was lost.
pub(super) fn migrate_to_uri3(
    domain: &Domain,
    dconn_uri: &CStr,
    parameters: &[(&CStr, Value)],
    flags: u32,
) -> Result<(), Error> {
    let mut list = TypedParams::new();
    for (name, value) in parameters {
        list.add(name, value)?;
    }
    // SAFETY: the domain is live while it is borrowed; URI and list outlive the call.
    let result = unsafe {
        sys::virDomainMigrateToURI3(
            domain.as_ptr(),
            dconn_uri.as_ptr(),
            list.params,
            list.nparams.cast_unsigned(),
            flags,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(Error::last_error()),
    }
}

struct TypedParams {
    params: sys::virTypedParameterPtr,
    nparams: c_int,
    maxparams: c_int,
}

impl TypedParams {
    fn new() -> Self {
        Self {
            params: ptr::null_mut(),
            nparams: 0,
            maxparams: 0,
        }
    }

    fn add(&mut self, name: &CStr, value: &Value) -> Result<(), Error> {
        let (params, nparams, maxparams) =
            (&mut self.params, &mut self.nparams, &mut self.maxparams);
        let name = name.as_ptr();
        // SAFETY: the three fields describe one array, which libvirt grows; libvirt copies name and
        // value.
        let result = unsafe {
            match value {
                Value::Text(value) => {
                    sys::virTypedParamsAddString(params, nparams, maxparams, name, value.as_ptr())
                }
                Value::Long(value) => {
                    sys::virTypedParamsAddULLong(params, nparams, maxparams, name, *value)
                }
                Value::Int(value) => {
                    sys::virTypedParamsAddInt(params, nparams, maxparams, name, *value)
                }
            }
        };
        match result {
            0 => Ok(()),
            _ => Err(Error::last_error()),
        }
    }
}

impl Drop for TypedParams {
    fn drop(&mut self) {
        // SAFETY: libvirt allocated the array, or the array is null and empty.
        unsafe { sys::virTypedParamsFree(self.params, self.nparams) };
    }
}
