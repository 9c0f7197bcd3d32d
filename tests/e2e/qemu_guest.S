# A guest that is all of its firmware: it goes from the reset vector to flat 32-bit mode, and then beats.
#
# A beat checks a page for what an earlier lap has left there, writes it anew, and says the low byte of its number on the debug
# console. One instruction says it, so no beat is ever half said, whenever the guest is paused.
.code16
.globl _start
_start:
    cli
    lgdtl %cs:gdtr
    movl %cr0, %eax
    orl $1, %eax
    movl %eax, %cr0
    ljmpl $8, $0xf0000 + protected
.code32
protected:
    movw $16, %ax
    movw %ax, %ds
    # Every page holds what a lap before the first would have left.
    movl $0x7ff, %ebx
1:  movl %ebx, %ecx
    shll $12, %ecx
    leal -0x800(%ebx), %edx
    movl %edx, 0x200000(%ecx)
    decl %ebx
    jg 1b
    xorl %ebx, %ebx
beat:
    incl %ebx
    # The page of this beat holds what was written to it one lap ago.
    movl %ebx, %ecx
    andl $0x7ff, %ecx
    shll $12, %ecx
    addl $0x200000, %ecx
    movl %ebx, %edx
    subl $0x800, %edx
    cmpl %edx, (%ecx)
    jne broken
    movl %ebx, (%ecx)
    movb %bl, %al
    outb %al, $0xe9
    rdtsc
    movl %eax, %esi
2:  pause
    rdtsc
    subl %esi, %eax
    cmpl $2000000, %eax
    jb 2b
    jmp beat
broken:
    hlt
    jmp broken
.balign 8
gdt: .quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff
gdtr: .word 23
    .long 0xf0000 + gdt
.org 0xfff0
.code16
    ljmp $0xf000, $_start
.org 0xfffe
    .word 0
