//! What a guest reads of its generation, on every way that it may take.

use super::*;
use crate::hypervisor::Generation;
use crate::vmm::config::EntryMode;
use crate::vmm::generation::{GENERATION_ADDRESS, page};
use crate::vmm::payload::generation_number;

fn generation(vm: &Vm) -> Generation {
    vm.status().generation.unwrap()
}

/// The page that the guest reads, checked to be what the VMM says.
fn shown(vm: &Vm) -> Generation {
    let mut bytes = vec![0; PAGE_BYTES];
    vm.ram().read(page_of(vm), &mut bytes).unwrap();
    assert!(bytes == page(generation(vm)), "{bytes:?}");
    generation(vm)
}

fn page_of(vm: &Vm) -> PageNumber {
    vm.ram().layout().page_of(GENERATION_ADDRESS).unwrap()
}

fn calm_guest() -> (Vm, ConsoleBuffer) {
    let (config, console) = payload(2, PayloadConfig { working_set_pages: 64, ticks_per_beat: 1, ..PayloadConfig::default() });
    let vm = Vm::create(&config).unwrap();
    (vm, console)
}

/// Lines about generations, and how many heartbeats came before the first.
fn told(console: &ConsoleBuffer) -> (Vec<u64>, usize) {
    let text = console.text();
    let before = text.lines().take_while(|line| generation_number(line).is_none()).count();
    (text.lines().filter_map(generation_number).collect(), before)
}

#[test]
fn moving_keeps_the_generation_and_counts_one_disruption_each_time() {
    if !kvm_usable("moving_keeps_the_generation_and_counts_one_disruption_each_time") {
        return;
    }
    let (mut vm, mut console) = calm_guest();
    let first = shown(&vm);
    assert_eq!((first.count, first.disruptions), (1, 0));
    vm.start().unwrap();
    for moves in 1..=3 {
        run_until_beats(&vm, &console, 2);
        let (destination, next_console) = twin(&vm, DirtyMode::Auto);
        assert_eq!(destination.status().generation, None, "an empty twin has none");
        let state = migrate(&vm, &destination, 1);
        destination.restore_state(&state).unwrap();
        assert_eq!(shown(&destination), shown(&vm), "nothing changes before it runs");
        assert_eq!(state_differences(&state, &destination.save_state().unwrap()).unwrap(), Vec::<String>::new());
        destination.resume().unwrap();
        for _ in 0..3 {
            destination.resume().unwrap();
            destination.pause().unwrap();
            destination.resume().unwrap();
        }
        assert_eq!(shown(&destination), Generation { disruptions: moves, ..first });
        (vm, console) = (destination, next_console);
        run_until_beats(&vm, &console, 1);
    }
    assert_eq!(told(&console).0, Vec::<u64>::new(), "the guest saw no other generation");
}

#[test]
fn a_guest_that_stays_after_an_aborted_move_sees_no_change() {
    if !kvm_usable("a_guest_that_stays_after_an_aborted_move_sees_no_change") {
        return;
    }
    let (vm, console) = calm_guest();
    vm.start().unwrap();
    let first = shown(&vm);
    run_until_beats(&vm, &console, 1);
    let (destination, _) = twin(&vm, DirtyMode::Auto);
    let state = migrate(&vm, &destination, 1);
    destination.restore_state(&state).unwrap();
    destination.quit();
    vm.resume().unwrap();
    run_until_beats(&vm, &console, 1);
    assert_eq!(shown(&vm), first);
}

#[test]
fn a_renewed_guest_learns_of_it_before_anything_else_and_the_page_is_dirty() {
    if !kvm_usable("a_renewed_guest_learns_of_it_before_anything_else_and_the_page_is_dirty") {
        return;
    }
    for dirty in [DirtyMode::Bitmap, DirtyMode::Ring { entries: 1 << 12 }] {
        let (mut config, console) = payload(1, PayloadConfig { working_set_pages: 64, ticks_per_beat: 1, ..PayloadConfig::default() });
        config.dirty = dirty;
        let vm = Vm::create(&config).unwrap();
        vm.start().unwrap();
        let first = shown(&vm);
        run_until_beats(&vm, &console, 2);
        assert!(vm.renew().is_err(), "not while it runs");
        assert_eq!(shown(&vm), first);
        vm.start_tracking().unwrap();
        vm.pause().unwrap();
        vm.harvest().unwrap();
        vm.renew().unwrap();
        let renewed = shown(&vm);
        assert_ne!(renewed.id, first.id);
        assert_eq!((renewed.count, renewed.disruptions), (2, 0));
        assert!(vm.harvest().unwrap().contains(page_of(&vm)), "the VMM's own write is harvested");
        assert!(vm.harvest().unwrap().is_empty());
        let beats_before = console.text().lines().count();
        vm.resume().unwrap();
        wait_for(&vm, "the new generation and a beat", || {
            told(&console).0 == [2] && console.text().lines().last().is_some_and(|line| line.starts_with("beat"))
        });
        // The guest may have been paused between its look at the generation and the printing of one beat.
        assert!(told(&console).1 <= beats_before + 1, "{}", console.text());
        assert_eq!(shown(&vm), renewed, "resuming where it stopped is no disruption");
    }
}

#[test]
fn two_guests_from_one_saved_state_are_told_apart_when_both_are_renewed() {
    if !kvm_usable("two_guests_from_one_saved_state_are_told_apart_when_both_are_renewed") {
        return;
    }
    let (source, console) = calm_guest();
    source.start().unwrap();
    run_until_beats(&source, &console, 1);
    source.pause().unwrap();
    let (first, state) = (shown(&source), source.save_state().unwrap());
    let restored = [(); 2].map(|()| {
        let (vm, console) = twin(&source, DirtyMode::Auto);
        assert!(vm.renew().is_err(), "an empty twin has no generation");
        copy_pages(&source, &vm, &PageSet::full(source.ram().pages()));
        vm.restore_state(&state).unwrap();
        vm.renew().unwrap();
        vm.resume().unwrap();
        wait_for(&vm, "the new generation", || told(&console).0 == [2]);
        let generation = shown(&vm);
        assert_eq!((generation.count, generation.disruptions), (2, 1));
        generation
    });
    assert!(restored[0].id != restored[1].id && restored.iter().all(|generation| generation.id != first.id));
}

#[test]
fn a_vm_without_room_for_the_generation_is_refused() {
    if !kvm_usable("a_vm_without_room_for_the_generation_is_refused") {
        return;
    }
    let flat = |image: Vec<u8>, load| Boot::Flat { image, load, mode: EntryMode::Real };
    let create = |memory, boot| Vm::create(&VmConfig::new(memory, 1, VmUuid([3; 16]), boot).unwrap());
    let text = |result: Result<Vm, crate::vmm::VmmError>| result.unwrap_err().to_string();
    assert!(text(create(GENERATION_ADDRESS, flat(vec![0xf4], 0x1000))).contains("expected RAM at 0xd0000"));
    assert!(text(create(2 << 20, flat(vec![0xf4; 2 * PAGE_BYTES], GENERATION_ADDRESS - 4096))).contains("covers 0xd0000"));
    assert!(create(GENERATION_ADDRESS + 4096, flat(vec![0xf4; PAGE_BYTES], GENERATION_ADDRESS - 4096)).is_ok());
}
