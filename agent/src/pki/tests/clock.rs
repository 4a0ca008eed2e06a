//! Certificates and lists by the clock of the host.

use rcgen::{CertificateRevocationListParams, KeyIdMethod, RevokedCertParams, SerialNumber};

use super::*;

#[test]
fn host_whose_clock_is_a_day_late_is_told_of_its_clock() {
    let directory = tempfile::tempdir().unwrap();
    init(directory.path(), "CA", Validity::days(9)).unwrap();
    // What was issued just now, for who takes today for yesterday.
    let mut tomorrow = Validity::days(9);
    tomorrow.not_before += time::Duration::days(1);
    let request = IssueRequest {
        validity: tomorrow,
        ..request("vms1")
    };
    let issued = issue(directory.path(), &request).unwrap();
    let error = Tls::load(&files(&issued), "vms1", Role::Agent).unwrap_err();
    assert!(matches!(error, TlsError::Expired { .. }), "{error}");
    assert!(error.to_string().contains("set the clock"), "{error}");
}

#[test]
fn list_of_revoked_certificates_that_is_old_refuses_the_same_as_before() {
    let directory = tempfile::tempdir().unwrap();
    let authorities = init(directory.path(), "CA", Validity::days(9)).unwrap();
    let own = files(&issue(directory.path(), &request("vms1")).unwrap());
    let [stolen, good] = ["vms2", "vms3"].map(|name| {
        let issued = issue(directory.path(), &request(name)).unwrap();
        certificate(&issued.signalling)
    });
    let (_, parsed) = x509_parser::parse_x509_certificate(&stolen).unwrap();
    let last_year = OffsetDateTime::now_utc() - time::Duration::days(365);
    let list = CertificateRevocationListParams {
        this_update: last_year,
        next_update: last_year + time::Duration::days(30),
        crl_number: SerialNumber::from(1),
        issuing_distribution_point: None,
        revoked_certs: vec![RevokedCertParams {
            serial_number: SerialNumber::from_slice(parsed.raw_serial()),
            revocation_time: last_year,
            reason_code: None,
            invalidity_date: None,
        }],
        key_identifier_method: KeyIdMethod::Sha256,
    };
    let issuer = authorities.signalling.issuer().unwrap();
    let list = list.signed_by(&issuer).unwrap().pem().unwrap();
    fs::write(&own.crl, list).unwrap();
    let tls = Tls::load(&own, "vms1", Role::Agent).unwrap();
    assert_eq!(tls.ended(&[stolen]), Some(Ended::Revoked));
    assert_eq!(tls.ended(&[good]), None);
}
