# The payload guest: proves from inside that a migration lost, changed, doubled or mixed up nothing.
#
# `payload_image.rs` holds the bytes; a test assembles this file and compares. After a change:
#   as payload.S -o p.o && ld -N -e header --oformat binary -Ttext 0x10000 p.o -o payload.bin
#
# The VMM starts every vCPU here in long mode with the identity map, interrupts off, RDI = vCPU number,
# RSP = top of the vCPU's own stack, GDT and IDT in place (the IDT from the header below).
#
# Registers, all the time:
#   r15 passes done   r14 vCPU   r13 own page   r12 ticks seen   r11 constant   r10 tick of the budget
#   r9 pages left of the budget   rdi next page   rsi end of the slice   rbx old key   rbp new key
# Word at address a of a page after pass p of vCPU c: a + key(p, c), key(p, c) = p * G + c * C.

.intel_syntax noprefix
.code64

.set INFO,    0x8000            # parameters from the VMM, never written here
.set I_VCPUS, 0x10
.set I_PIT,   0x18              # PIT divisor
.set I_BEAT,  0x20              # ticks between heartbeats
.set I_RATE,  0x28              # pages for each tick and vCPU, 0 = as fast as it goes
.set I_SPAN,  0x30              # least TSC cycles that eight tick periods may take
.set I_LAST,  0x38              # heartbeats until a clean end, 0 = never
.set I_SLICE, 0x40              # start and end of each vCPU's slice
.set SHARED,  0x9000            # written by vCPU 0 only, but for the report: ticks, ~ticks
.set S_TSC,   0x10              # time of the last tick
.set S_BEATS, 0x28              # beats, ~beats
.set S_NEXT,  0x38              # tick of the next beat
.set S_STOP,  0x40              # report of a failed check: code, address, found, expected
.set S_LIFE,  0x60              # generation counter that was seen last
.set S_RING,  0x80              # times of the last eight ticks
.set LIFE,    0xd0000           # written by the VMM while no vCPU runs
.set L_COUNT, 0x20              # generation counter
.set OWN,     0x100000          # two pages for each vCPU: passes, ~passes, wakes, scratch; stack
.set CHUNK,   256               # pages between two looks at the clock

.set E_PAGE,  1                 # a page holds what was never written
.set E_PASS,  2                 # a page is of another pass: page lost, or vCPU continued at another place
.set E_REGS,  3
.set E_XMM,   4
.set E_DEBUG, 5
.set E_SREGS, 6
.set E_MSR,   7
.set E_LAPIC, 8
.set E_TICK,  9                 # tick counters disagree
.set E_RATE,  10                # ticks faster than the timer, or time went back
.set E_BEAT,  11
.set E_FAULT, 12                # an exception nobody expects

header:
    jmp start
    .balign 8, 0xcc
    .quad on_tick               # vector 0x20
    .quad on_wake               # vector 0x40
    .quad on_spurious           # vectors 0x27, 0xff
    .quad on_fault              # everything else

start:
    mov r14d, edi
    mov r13d, edi
    shl r13d, 13
    add r13d, OWN
    xor r12d, r12d
    xor r15d, r15d
    xor r10d, r10d
    xor r9d, r9d
    movabs r11, 0x5ea1a9e05ea1a9e0
    xor r11, r14
    mov eax, 0xfee00000
    mov dword ptr [rax + 0xf0], 0x1ff       # LAPIC on, spurious vector 0xff
    test edi, edi
    jnz 1f
    mov dword ptr [rax + 0x350], 0x700      # LINT0: the PIC interrupts vCPU 0
    mov al, 0x11                            # PIC: vectors 0x20 and 0x28, only line 0 open
    out 0x20, al
    out 0xa0, al
    mov al, 0x20
    out 0x21, al
    mov al, 0x28
    out 0xa1, al
    mov al, 4
    out 0x21, al
    mov al, 2
    out 0xa1, al
    mov al, 1
    out 0x21, al
    out 0xa1, al
    mov al, 0xff
    out 0xa1, al
    mov al, 0xfe
    out 0x21, al
    mov ecx, SHARED
    mov rax, -1
    mov [rcx + 8], rax
    mov [rcx + S_BEATS + 8], rax
    mov ecx, INFO
    mov rax, [rcx + I_BEAT]
    mov ecx, SHARED
    mov [rcx + S_NEXT], rax
    mov edx, LIFE
    mov rax, [rdx + L_COUNT]
    mov [rcx + S_LIFE], rax
    mov al, 0x34                            # PIT channel 0: rate generator
    out 0x43, al
    mov ecx, INFO
    mov rax, [rcx + I_PIT]
    out 0x40, al
    mov al, ah
    out 0x40, al
    jmp 2f
1:  mov dword ptr [rax + 0x350], 0x10000    # LINT0 masked on the others
2:  call stamp
    sti

# --- first pass: fresh memory reads zero -----------------------------------------------------
    call slice
    call keys
first:
    call gate
3:  xor eax, eax
    cmp [rdi], rax
    jne bad_head
    cmp [rdi + 0x800], rax
    jne bad_middle
    cmp [rdi + 0xff8], rax
    jne bad_tail
    lea rax, [rdi + rbp]
    mov [rdi], rax
    add rax, 0x800
    mov [rdi + 0x800], rax
    add rax, 0x7f8
    mov [rdi + 0xff8], rax
    add rdi, 0x1000
    cmp rdi, r8
    jb 3b
    cmp rdi, rsi
    jb first
    call check
    inc r15
    call stamp

# --- every other pass: verify what the last pass wrote, then write -----------------------------
pass:
    call slice
    call keys
chunk:
    call gate
4:  lea rax, [rdi + rbx]
    cmp [rdi], rax
    jne bad_head
    add rax, 0x800
    cmp [rdi + 0x800], rax
    jne bad_middle
    add rax, 0x7f8
    cmp [rdi + 0xff8], rax
    jne bad_tail
    lea rax, [rdi + rbp]
    mov [rdi], rax
    add rax, 0x800
    mov [rdi + 0x800], rax
    add rax, 0x7f8
    mov [rdi + 0xff8], rax
    add rdi, 0x1000
    cmp rdi, r8
    jb 4b
    cmp rdi, rsi
    jb chunk
    call check                              # before stamp, which would cover what is stale
    inc r15
    call stamp
    jmp pass

# rdi, rsi = this vCPU's slice
slice:
    mov ecx, r14d
    shl ecx, 4
    add ecx, INFO + I_SLICE
    mov rdi, [rcx]
    mov rsi, [rcx + 8]
    ret

# rbx, rbp = key of the last pass and of this one
keys:
    movabs rax, 0x9e3779b97f4a7c15
    mov rbx, r15
    imul rbx, rax
    movabs rcx, 0x2545f4914f6cdd1d
    imul rcx, r14
    add rbx, rcx
    lea rbp, [rbx + rax]
    ret

# Writes the number of passes wherever a vCPU keeps state.
stamp:
    mov [r13], r15
    mov rax, r15
    not rax
    mov [r13 + 8], rax
    mov [r13 + 0x20], r15
    mov [r13 + 0x28], rax
    movdqu xmm0, [r13 + 0x20]
    movdqu xmm15, [r13 + 0x20]
    mov dr0, r15
    mov cr2, r15
    mov ecx, 0xc0000102                     # KERNEL_GS_BASE
    mov eax, r15d
    xor edx, edx
    wrmsr
    mov edx, 0xfee00000
    mov eax, r15d
    shl eax, 24
    mov [rdx + 0x310], eax                  # upper ICR: a byte that nothing else uses
    ret

# Everything stamped at the end of the last pass must still say r15. Uses rbx.
check:
    mov ebx, E_REGS
    mov rax, [r13]
    cmp rax, r15
    jne bad_state
    not rax
    cmp rax, [r13 + 8]
    jne bad_state
    movabs rax, 0x5ea1a9e05ea1a9e0
    xor rax, r14
    cmp rax, r11
    jne bad_state
    mov ebx, E_XMM
    movdqu [r13 + 0x20], xmm0
    cmp [r13 + 0x20], r15
    jne bad_state
    movdqu [r13 + 0x20], xmm15
    mov rax, [r13 + 0x28]
    not rax
    cmp rax, r15
    jne bad_state
    mov ebx, E_DEBUG
    mov rax, dr0
    cmp rax, r15
    jne bad_state
    mov ebx, E_SREGS
    mov rax, cr2
    cmp rax, r15
    jne bad_state
    mov ebx, E_MSR
    mov ecx, 0xc0000102
    rdmsr
    cmp eax, r15d
    jne bad_state
    mov ebx, E_LAPIC
    mov eax, 0xfee00000
    mov eax, [rax + 0x310]
    shr eax, 24
    cmp al, r15b
    jne bad_state
    ret

# r8 = end of the next chunk; waits for the next tick when the budget of this one is used up,
# and lets vCPU 0 print its heartbeat, and before that a generation that it has not seen.
gate:
    test r14d, r14d
    jnz 5f
    mov ecx, SHARED
    mov edx, LIFE
    mov rax, [rdx + L_COUNT]
    cmp rax, [rcx + S_LIFE]
    je 4f
    call life
    mov ecx, SHARED
4:  mov rax, [rcx]
    cmp rax, [rcx + S_NEXT]
    jb 5f
    call beat
5:  mov ecx, INFO
    mov rdx, [rcx + I_RATE]
    mov eax, CHUNK
    test rdx, rdx
    jz 8f
    test r9, r9
    jnz 7f
    mov ecx, SHARED
    cli
    mov rax, [rcx]
    cmp rax, r10
    jne 6f
    sti
    hlt                                     # sti holds interrupts back for one instruction
    jmp gate
6:  sti
    mov r10, rax
    mov r9, rdx
7:  mov eax, CHUNK
    cmp rax, r9
    cmova rax, r9
    sub r9, rax
8:  shl rax, 12
    lea r8, [rdi + rax]
    cmp r8, rsi
    cmova r8, rsi
    ret

# Prints `beat N` and a line feed.
beat:
    mov ecx, SHARED
    mov rax, [rcx + S_BEATS]
    not rax
    mov ebx, E_BEAT
    cmp rax, [rcx + S_BEATS + 8]
    jne bad_state
    not rax
    inc rax
    mov [rcx + S_BEATS], rax
    mov rbx, rax
    not rax
    mov [rcx + S_BEATS + 8], rax
    mov ecx, INFO
    mov rax, [rcx + I_BEAT]
    mov ecx, SHARED
    add [rcx + S_NEXT], rax
    lea rdx, [rip + says_beat]
    call say
    mov ecx, INFO
    cmp rbx, [rcx + I_LAST]
    je done
    jmp keys                                # rbx was borrowed; rbp comes out the same

# Prints `generation N` and a line feed; rax = N.
life:
    mov [rcx + S_LIFE], rax
    mov rbx, rax
    lea rdx, [rip + says_generation]
    call say
    jmp keys

# Prints the text at rdx, rbx in decimal and a line feed. Keeps rbx.
say:
    mov r8, rdx
    mov edx, 0x3fd
9:  in al, dx                               # transmitter ready?
    test al, 0x20
    jz 9b
    mov edx, 0x3f8
13: mov al, [r8]
    test al, al
    jz 14f
    out dx, al
    inc r8
    jmp 13b
14: lea rcx, [r13 + 0x80]                   # digits, last first
    mov byte ptr [rcx], 10
    mov rax, rbx
    mov r8d, 10
10: xor edx, edx
    div r8
    add dl, '0'
    dec rcx
    mov [rcx], dl
    test rax, rax
    jnz 10b
    mov edx, 0x3f8
11: mov al, [rcx]
    out dx, al
    inc rcx
    cmp al, 10
    jne 11b
    ret

says_beat:
    .asciz "beat "
says_generation:
    .asciz "generation "

done:
    xor eax, eax
    mov edx, 0xf4
    out dx, eax
    jmp rest

# --- interrupts --------------------------------------------------------------------------------
on_tick:
    push rax
    push rcx
    push rdx
    mov ecx, SHARED
    mov rax, [rcx]
    not rax
    cmp rax, [rcx + 8]
    jne bad_tick
    not rax
    cmp rax, r12
    jne bad_tick
    inc rax
    inc r12
    mov [rcx], rax
    not rax
    mov [rcx + 8], rax
    rdtsc
    shl rdx, 32
    or rax, rdx
    cmp rax, [rcx + S_TSC]
    jb bad_rate                             # time went back
    mov [rcx + S_TSC], rax
    mov edx, r12d
    and edx, 7
    lea ecx, [rcx + rdx * 8 + S_RING]
    mov rdx, rax
    sub rdx, [rcx]                          # since eight ticks ago
    mov [rcx], rax
    mov ecx, INFO
    cmp rdx, [rcx + I_SPAN]
    jb bad_rate
    mov al, 0x20
    out 0x20, al                            # end of interrupt
    cmp dword ptr [rcx + I_VCPUS], 1
    je 12f
    mov eax, 0xfee00000
    mov dword ptr [rax + 0x300], 0xc4040    # vector 0x40 to all but this one
12: pop rdx
    pop rcx
    pop rax
    iretq

on_wake:
    push rax
    cmp r12, [r13 + 0x10]
    jne bad_tick
    inc r12
    mov [r13 + 0x10], r12
    mov eax, 0xfee00000
    mov dword ptr [rax + 0xb0], 0
    pop rax
on_spurious:
    iretq

on_fault:
    mov ebx, E_FAULT
    mov rdx, [rsp]
    mov rcx, [rsp + 8]
    jmp stop

# --- the end -----------------------------------------------------------------------------------
bad_tick:
    mov ebx, E_TICK
    jmp bad_state
bad_rate:
    mov ebx, E_RATE
bad_state:
    xor edx, edx
    xor ecx, ecx
    jmp stop
bad_tail:
    lea rdx, [rdi + 0xff8]
    jmp bad_page
bad_middle:
    lea rdx, [rdi + 0x800]
    jmp bad_page
bad_head:
    mov rdx, rdi
bad_page:                                   # of which pass is the word that was found?
    mov rcx, [rdx]
    mov r8, rcx
    sub r8, rdx
    movabs rbx, 0x2545f4914f6cdd1d
    imul rbx, r14
    sub r8, rbx
    movabs rbx, 0xf1de83e19937733d          # inverse of G
    imul r8, rbx
    mov ebx, E_PAGE
    lea rbp, [r15 + 1]
    cmp r8, rbp
    ja stop
    mov ebx, E_PASS
    test rcx, rcx
    jnz stop
stop:
    cli
    mov r8d, SHARED + S_STOP
    mov [r8], rbx
    mov [r8 + 8], rdx
    mov [r8 + 16], rcx
    mov [r8 + 24], rax
    mov eax, r14d
    shl eax, 8
    or eax, ebx
    mov edx, 0xf4
    out dx, eax
rest:
    cli
    hlt
    jmp rest
