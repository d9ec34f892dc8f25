//! Addresses of pods: those that the records tell, and those that a plugin says it has given out.

use gantry_ports::network::Held;
use gantry_types::PodState;

use super::{Claim, Found, Place};
use crate::{Context, Error};

pub(super) fn list(ctx: &Context) -> Result<Vec<Found>, Error> {
    let mut all = Vec::new();
    for pod in ctx.registry.pods() {
        if matches!(pod.state, PodState::Ready { .. }) {
            let id = &pod.facts.id;
            let found = |ip: &String| {
                let place = Place::Attachment(id.clone(), ip.clone());
                Found::new(place, ip, Claim::Pod(id.clone()))
            };
            all.extend(pod.ips.iter().map(found));
        }
    }
    let held = ctx.network.held().map_err(Error::step("list addresses"))?;
    all.extend(held.into_iter().map(
        |Held {
             pod,
             address,
             other,
         }| {
            let place = Place::Attachment(pod.clone(), address.to_string());
            let claim = match other {
                Some(other) => Claim::PodOrOf(pod, other),
                None => Claim::Pod(pod),
            };
            Found::new(place, address, claim)
        },
    ));
    Ok(all)
}
